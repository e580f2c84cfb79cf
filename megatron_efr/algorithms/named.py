"""The field's algorithms by name, each with the defaults of its source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from megatron_efr.algorithms.base import Algorithm, Normalize, Positive, Share, Truncated, Weight
from megatron_efr.algorithms.baselines import Baseline
from megatron_efr.algorithms.objective import KL, Aggregate, Deviation, Guard, Ratio, Surrogate


class RLOO(Algorithm):
    """Leave-one-out baseline, KL in the reward, nothing normalised (Arora & Zanette 2025; Ahmadian
    et al. 2024).

    The paper's released code whitens over all tokens of the iteration: `normalize: tokens`.
    """

    name: str = "rloo"


class GRPO(Algorithm):
    """Group mean and sample deviation, k3 in the loss, the mean over each sequence (Shao et al.
    2024).

    verl and slime add 1e-6 to the deviation (the default), TRL 1e-4, Dr. GRPO's authors 1e-8:
    `epsilon`. verl and TRL take the mean over all tokens: `aggregate: token`; verl bounds negative
    advantages: `dual_clip: 3`. NeMo-RL leaves a response out of its own baseline and deviation:
    `baseline: others`, `deviation: others`.
    """

    name: str = "grpo"
    baseline: Baseline = "mean"
    normalize: Normalize = "group"
    deviation: Deviation = "sample"
    guard: Guard = "std"
    epsilon: Positive = 1e-6
    kl: KL = "k3"
    beta: Weight = 0.04


class DrGRPO(Algorithm):
    """Group mean, no deviation, each sequence's sum over a constant: the limit of tokens (Liu et
    al. 2025).

    verl's mode divides by the width that its batch is padded to: `divisor: longest`.
    """

    name: str = "dr_grpo"
    baseline: Baseline = "mean"
    kl: KL = "none"
    aggregate: Aggregate = "constant"


class ReinforcePlusPlus(Algorithm):
    """No baseline, KL to go in the reward, whitened over all tokens (Hu 2025, arXiv 2501.03262),
    gamma 1.

    Every token counts once, so that long responses set the mean. verl's whitening: sample variance
    + 1e-8. NeMo-RL's: `deviation: population`, `guard: floor`.
    """

    name: str = "reinforce_plus_plus"
    baseline: Baseline = "none"
    normalize: Normalize = "tokens"
    deviation: Deviation = "sample"
    guard: Guard = "variance"
    aggregate: Aggregate = "token"


class ReinforcePlusPlusBaseline(ReinforcePlusPlus):
    """REINFORCE++ with the group mean as baseline, and k2 in the loss in place of the KL to go (Hu
    2025).
    """

    name: str = "reinforce_plus_plus_baseline"
    baseline: Baseline = "mean"
    kl: KL = "k2"


class DAPO(GRPO):
    """GRPO with the upper clip higher, the mean over all tokens, no KL, prompts without signal
    replaced, and a soft penalty before the limit of tokens (Yu et al. 2025, arXiv 2503.14476).

    `truncated: masked` is its overlong filtering.
    """

    name: str = "dapo"
    clip_high: Positive = 0.28
    kl: KL = "none"
    beta: Weight = 1e-3
    aggregate: Aggregate = "token"
    truncated: Truncated = "soft"
    dynamic_sampling: bool = True


class GSPO(GRPO):
    """One ratio for a sequence, exp of its mean log-ratio, clipped within 3e-4 and 4e-4 (Zheng et
    al. 2025).
    """

    ratio: ClassVar[Ratio] = "sequence"

    name: str = "gspo"
    clip_low: Share = 3e-4
    clip_high: Positive = 4e-4
    kl: KL = "none"
    beta: Weight = 1e-3

    def _contradictions(self) -> list[str]:
        found = super()._contradictions()
        if self.aggregate != "sequence":
            found.append(
                f"algorithm.aggregate: {self.aggregate} would weigh a sequence's one ratio by its "
                "length; gspo takes the mean over each sequence: sequence"
            )
        if self.dual_clip is not None:
            found.append(
                "algorithm.dual_clip: a sequence's ratio is clipped within 1e-3 of 1 already; "
                "leave it out"
            )
        return found


class CISPO(GRPO):
    """The clipped ratio as a constant weight of the log-prob, so that no token loses its gradient
    (MiniMax 2025).

    There is no lower bound by default. verl and slime keep PPO's: `clip_low: 0.2`. TRL's
    `epsilon_high` is the bound itself: 1 + `clip_high`.
    """

    surrogate: ClassVar[Surrogate] = "reweight"

    name: str = "cispo"
    clip_low: Share = 1.0
    clip_high: Positive = 0.28
    kl: KL = "none"
    beta: Weight = 1e-3
    aggregate: Aggregate = "token"


class Likelihood(Algorithm):
    """Log-likelihood weighed by the rewards as they are: no ratio, no clip, no baseline, no KL.

    A reward is the weight of its response. Rewards of 0 and 1 too make a mean over all responses;
    `filtered_sft` takes it over the right ones alone. DRPO's credits are made for it (arXiv
    2510.04474).
    """

    surrogate: ClassVar[Surrogate] = "reweight"

    name: str = "likelihood"
    baseline: Baseline = "none"
    kl: KL = "none"
    clip_low: float = Field(default=0.0, ge=0, le=0, description="there is no ratio")
    clip_high: float = Field(default=0.0, ge=0, le=0, description="there is no ratio")


class FilteredSFT(Likelihood):
    """Filtered iterative SFT on a policy's own positives: log-likelihood of the responses that
    pass, and of no others.

        A = 1 if r > above; the others are left out of the loss and of its means

    Samineni et al. 2025, arXiv 2505.13697 (second-hand), hold GRPO against it; Dong et al. 2023,
    arXiv 2304.06767, call one round of it RAFT. With `method: {name: efr, alpha: 0}` those pass
    that are right.
    """

    filters: ClassVar[bool] = True

    name: str = "filtered_sft"
    above: float = Field(default=0.0, description="a response passes if its reward is above this")

    def credits(
        self, rewards: Sequence[np.ndarray], lengths: Sequence[np.ndarray], limit: int
    ) -> list[np.ndarray]:
        return [np.where(self._positive(each), 1.0, self._otherwise) for each in rewards]

    def passes(self, rewards: np.ndarray) -> np.ndarray:
        return self._positive(rewards)

    def keeps(self, rewards: np.ndarray) -> bool:
        # responses that are all alike teach here too, if they pass
        return not self.dynamic_sampling or bool(self._positive(rewards).any())

    def _positive(self, rewards: np.ndarray) -> np.ndarray:
        return np.asarray(rewards, dtype=np.float64) > self.above

    @property
    def _otherwise(self) -> float:
        """The advantage of a response that does not pass."""
        return 0.0

    def _contradictions(self) -> list[str]:
        found = super()._contradictions()
        for key, alone in (("baseline", "none"), ("normalize", "none")):
            if getattr(self, key) != alone:
                found.append(
                    f"algorithm.{key}: {self.name} tells apart what passes and what does not; "
                    "leave it out"
                )
        if self.truncated == "soft":
            found.append(
                f"algorithm.truncated: soft takes from rewards, and {self.name} asks only on "
                "which side of algorithm.above they are; set algorithm.truncated: wrong or masked"
            )
        return found


class FilteredSFTNegatives(FilteredSFT):
    """Filtered iterative SFT with negatives: towards the responses that pass, and away from the
    others.

        A = 1 if r > above, else -negative

    Samineni et al. 2025, arXiv 2505.13697 (second-hand): GRPO without its ratio, its clip and its
    spread of the group. The weight of negatives is this project's. Nothing bounds how unlikely a
    wrong response can be made: it is meant for one update on each iteration (`train.updates: 1`).
    """

    name: str = "filtered_sft_negatives"
    negative: Positive = Field(default=1.0, description="weight of a response that does not pass")

    def passes(self, rewards: np.ndarray) -> np.ndarray:
        return np.ones(len(rewards), dtype=bool)

    def keeps(self, rewards: np.ndarray) -> bool:
        return True  # every response teaches: towards it, or away from it

    @property
    def _otherwise(self) -> float:
        return -self.negative

    def _contradictions(self) -> list[str]:
        found = super()._contradictions()
        if self.dynamic_sampling:
            found.append(
                f"algorithm.dynamic_sampling: every group teaches {self.name}; leave it out"
            )
        return found


class OPO(Algorithm):
    """The length-weighted baseline of least variance, no normalisation and no KL (Hao et al.
    2025).
    """

    name: str = "opo"
    baseline: Baseline = "length"
    kl: KL = "none"
    aggregate: Aggregate = "token"
