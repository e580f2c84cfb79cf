"""Thoughts in rounds: a response begins anew once it has summed up what it thought so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
from pydantic import Field, PositiveInt

from megatron_efr.methods.base import Ask, Known, Method, Needs, Visit
from megatron_efr.methods.branching import tried_answers
from megatron_efr.methods.plain import Outcomes, tells
from megatron_efr.scripts import Rounds
from megatron_efr.types import BoolArray, Credit, FloatArray, Graded, Response, Rewarded

Token = Annotated[str, Field(min_length=1)]


class InftyThink(Method):
    """InftyThink: a thought in rounds, each of which sees the prompt and a summary of the round
    before.

        A = c - mean c of the group,  c = 1 if the last round is right, of every round of a response

    A round that ends with a summary is followed by another. A response whose last round is wrong,
    or truncated, earns
    0. Nothing is remembered. Each round is a sample of its own, behind the prompt and the summary
       that it saw, which a
    script wrote and nobody trains on. The lengths that figures tell are of first rounds. The source
    trains by SFT on thoughts that were cut into rounds, which the model has to know first; this is
    its rollout, with accuracy as reward.
    """

    source = (
        "Yan et al. 2025, arXiv 2503.06692; ZJU-REAL/InftyThink@dc3e848 inference/infer_single.py"
    )
    standing = "code"

    needs = Needs(branches=True)

    round_tokens: PositiveInt = Field(default=8192, description="tokens of a round at most")
    rounds: PositiveInt = Field(default=50, description="rounds of a response at most")
    opens: Token = Field(default="<summary>", description="what opens a summary")
    closes: Token = Field(default="</summary>", description="what closes it")
    history: Annotated[Token, tells("summary")] = Field(
        default="<history>\n{summary}\n</history>", description="what the next round opens with"
    )

    @property
    def sought(self) -> Mapping[str, str]:
        return {"opens": self.opens, "closes": self.closes}

    @property
    def equal_rewards_teach(self) -> bool:
        return False

    def ask(self, visit: Visit, known: Known) -> Ask:
        script = Rounds(
            tokens=self.round_tokens,
            most=self.rounds,
            opens=self.opens,
            closes=self.closes,
            history=self.history,
        )
        return Ask(scripts=(script,) * visit.samples)

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        first = Outcomes.of(group, known.limit).right
        made = [
            self._last(*each)
            for each in zip(group.group.responses, first, tried_answers(group), strict=True)
        ]
        return np.array(made, dtype=np.float64)

    def credits(self, groups: Sequence[Rewarded], known: Known) -> Sequence[Credit]:
        return [self._credit(group) for group in groups]

    def _last(self, response: Response, first: bool, later: BoolArray) -> bool:
        """True if the last round is right, and was not cut."""
        return (
            bool(later[-1] and not response.answers[-1][1].truncated) if len(later) else bool(first)
        )

    def _credit(self, group: Rewarded) -> Credit:
        advantage = group.rewards - group.rewards.mean()
        rounds = [len(response.answers) for response in group.group.responses]
        return Credit(
            advantage,
            branches=tuple(
                np.full(count, each) for count, each in zip(rounds, advantage, strict=True)
            ),
        )
