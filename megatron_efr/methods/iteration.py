"""Rewards that only the whole iteration decides: the prompts of an iteration are compared with each
other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from pydantic import Field

from megatron_efr.config import ConfigError, RolloutConfig
from megatron_efr.methods.base import Known, Method
from megatron_efr.methods.efr import efr_rewards
from megatron_efr.methods.plain import Outcomes
from megatron_efr.types import FloatArray, Graded, Rewarded


class GRPOLambda(Method):
    """GRPO-lambda: only the prompts that are solved best are shortened.

        the floor(share groups) groups with the largest p = share of right responses: r = efr's,
            with alpha
        all others:                                                              r = c

    A wrong or truncated response earns 0. Nothing is remembered. Groups with equal p are taken in
    the order in which they were asked; the text leaves that open. Its algorithm is `grpo`.
    """

    source = "Dai et al. 2025, arXiv 2505.18086, section 3"
    standing = "text"

    alpha: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="alpha of the paper's reward, in the groups that are shortened",
    )
    share: float = Field(
        default=0.2, gt=0, le=1, description="share of an iteration's groups that are shortened"
    )

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        return Outcomes.of(group, known.limit).right.astype(np.float64)

    def settle(self, groups: Sequence[Rewarded], known: Known) -> Sequence[Rewarded]:
        solved = np.array([group.rewards.mean() for group in groups])
        best = np.argsort(-solved, kind="stable")[: self._shortens(len(groups))]
        return [
            self._shortened(group, known) if i in best else group for i, group in enumerate(groups)
        ]

    def check(self, rollout: RolloutConfig) -> None:
        if self._shortens(rollout.prompts) == 0:
            raise ConfigError(
                f"method.share: {self.share:g} of rollout.prompts = {rollout.prompts} groups is "
                f"less than one, so that none would be shortened; set it to 1/{rollout.prompts} "
                "or more, or ask more prompts"
            )

    def _shortens(self, groups: int) -> int:
        return int(self.share * groups + 1e-9)

    def _shortened(self, group: Rewarded, known: Known) -> Rewarded:
        seen = Outcomes.of(group.graded, known.limit)
        return replace(group, rewards=efr_rewards(seen.right, seen.lengths, self.alpha))
