"""Lengths within a group: a response is measured by the other responses to its prompt."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from megatron_efr.methods.plain import Outcomes, Plain
from megatron_efr.types import FloatArray


class ShorterBetter(Plain):
    """ShorterBetter: the distance from the length of the shortest right response.

        r = alpha c - beta |l - SOL|,  SOL = the shortest right length, or the mean of all if none is right

    Wrong and truncated responses pay for the distance too. Nothing is remembered. The paper has alpha 1 or 2.
    """

    source = "Yi et al. 2025, arXiv 2504.21370; JingyangYi/ShorterBetter@6399366 naive.py:130-252"
    standing = "code"
    wrong_may_win = "a right answer is alpha / beta tokens (2,000) further from the shortest one than a wrong answer is"

    alpha: float = Field(default=2.0, gt=0, description="what a right answer earns")
    beta: float = Field(default=1e-3, ge=0, description="what a token of distance costs")

    def rule(self, group: Outcomes) -> FloatArray:
        wanted = group.right_lengths.min() if group.right.any() else group.lengths.mean()
        return self.alpha * group.right - self.beta * np.abs(group.lengths - wanted)


class Kimi(Plain):
    """Kimi k1.5's length reward.

        lambda = 0.5 - (l - lmin) / (lmax - lmin) over all responses of the group; 0 if all are equally long
        r = 1 + weight lambda if right, weight min(0, lambda) if wrong

    A wrong or truncated response earns nothing for being short, and pays for being long. Nothing is remembered. The
    text gives no weight; 1 is this project's, 0.4 that of LASER's copy. The paper trains without it at first.
    """

    source = "Kimi team 2025, arXiv 2501.12599, section 2.3.3"
    standing = "text"

    weight: float = Field(default=1.0, ge=0, le=1, description="of the length's part")

    def rule(self, group: Outcomes) -> FloatArray:
        shortest, longest = group.lengths.min(), group.lengths.max()
        if shortest == longest:
            return group.right.astype(np.float64)
        brevity = 0.5 - (group.lengths - shortest) / (longest - shortest)
        return group.right + self.weight * np.where(group.right, brevity, np.minimum(brevity, 0.0))


class PrimeRL(Plain):
    """prime-rl's length penalty: a share of the group's mean reward.

        r = c - mean(c) (length l / max l + prompt + turns)

    Wrong and truncated responses pay too. The easier the prompt, the more all pay. Prompt and turns are equal within a
    group here, so that their terms move all rewards alike. Nothing is remembered. Its algorithm takes off the group's
    mean and divides by nothing (`dr_grpo`).
    """

    source = "PrimeIntellect-ai/prime-rl@559b447 orchestrator/algo/grpo.py"
    standing = "code"

    length: float = Field(default=0.25, ge=0, le=1, description="weight of the response's tokens")
    prompt: float = Field(default=0.1, ge=0, le=1, description="weight of the prompt's tokens")
    turns: float = Field(default=0.1, ge=0, le=1, description="weight of the number of turns")

    def rule(self, group: Outcomes) -> FloatArray:
        cost = self.length * group.lengths / group.lengths.max() + self.prompt + self.turns
        return group.right - group.accuracy * cost
