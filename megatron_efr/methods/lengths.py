"""Lengths within a group: a response is measured by the other responses to its prompt."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from megatron_efr.methods.base import Known, Method
from megatron_efr.methods.plain import Outcomes, Plain
from megatron_efr.types import BoolArray, FloatArray, Graded


class ShorterBetter(Plain):
    """ShorterBetter: the distance from the length of the shortest right response.

        r = alpha c - beta |l - SOL|,  SOL = the shortest right length,
            or the mean of all if none is right

    Wrong and truncated responses pay for the distance too. Nothing is remembered. The paper has
    alpha 1 or 2.
    """

    source = "Yi et al. 2025, arXiv 2504.21370; JingyangYi/ShorterBetter@6399366 naive.py:130-252"
    standing = "code"
    wrong_may_win = (
        "a right answer is alpha / beta tokens (2,000) further from the shortest one than a wrong "
        "answer is"
    )

    alpha: float = Field(default=2.0, gt=0, description="reward of a right answer")
    beta: float = Field(default=1e-3, ge=0, description="price of a token of distance")

    def rule(self, group: Outcomes) -> FloatArray:
        wanted = group.right_lengths.min() if group.right.any() else group.lengths.mean()
        return self.alpha * group.right - self.beta * np.abs(group.lengths - wanted)


class Kimi(Plain):
    """Kimi k1.5's length reward.

        lambda = 0.5 - (l - lmin) / (lmax - lmin) over all responses of the group; 0 if all are
            equally long
        r = 1 + weight lambda if right, weight min(0, lambda) if wrong

    A wrong or truncated response earns nothing for being short, and pays for being long. Nothing is
    remembered. The text gives no weight; 1 is this project's, 0.4 that of LASER's copy. The paper
    trains without it at first.
    """

    source = "Kimi team 2025, arXiv 2501.12599, section 2.3.3"
    standing = "text"

    weight: float = Field(default=1.0, ge=0, le=1, description="weight of the length's part")

    def rule(self, group: Outcomes) -> FloatArray:
        shortest = group.lengths.min()
        longest = group.lengths.max()
        if shortest == longest:
            return group.right.astype(np.float64)
        brevity = 0.5 - (group.lengths - shortest) / (longest - shortest)
        return group.right + self.weight * np.where(group.right, brevity, np.minimum(brevity, 0.0))


class PrimeRL(Plain):
    """prime-rl's length penalty: a share of the group's mean reward.

        r = c - mean(c) (length l / max l + prompt + turns)

    Wrong and truncated responses pay too. The easier the prompt, the more all pay. Prompt and turns
    are equal within a group here, so that their terms move all rewards alike. Nothing is
    remembered. Its algorithm takes off the group's mean and divides by nothing (`dr_grpo`).
    """

    source = "PrimeIntellect-ai/prime-rl@559b447 orchestrator/algo/grpo.py"
    standing = "code"

    length: float = Field(default=0.25, ge=0, le=1, description="weight of the response's tokens")
    prompt: float = Field(default=0.1, ge=0, le=1, description="weight of the prompt's tokens")
    turns: float = Field(default=0.1, ge=0, le=1, description="weight of the number of turns")

    def rule(self, group: Outcomes) -> FloatArray:
        cost = self.length * group.lengths / group.lengths.max() + self.prompt + self.turns
        return group.right - group.accuracy * cost


class GRLC(Method):
    """GRLC, of Nemotron 3: thinking and answer are each measured by those of the group, in
    characters.

        w = u - mean u,  u = 1 - (length - min) / (max - min);  0 if all are equally long
        r = c + thinking w_thinking + answer w_answer + bonuses
        bonus: thinking_bonus for the shortest thinking and answer_bonus for the shortest answer,
            each if its c is among
               the `top` share of the group by rank; those that are equally short all get it,
                   an empty part never does

    Thinking ends with `end`; a response without it is all thinking. Space around a part does not
    count. Wrong and truncated responses are measured too, and earn 0 besides. Nothing is
    remembered. The weights are those that the report names; the code's defaults are 0.
    """

    source = "NVIDIA-NeMo/Gym@07d6b0d resources_servers/genrm_compare/utils.py:567-677"
    standing = "code"
    wrong_may_win = (
        "fewer responses than the `top` share are right, so that a wrong one gets the bonus of "
        "the shortest"
    )
    wrong_may_win_if = "`thinking` and `answer` are above 1 together"

    thinking: float = Field(default=0.5, ge=0, description="weight of the thinking's length")
    answer: float = Field(default=0.5, ge=0, description="weight of the answer's length")
    thinking_bonus: float = Field(default=0.5, ge=0, description="bonus of the shortest thinking")
    answer_bonus: float = Field(default=0.5, ge=0, description="bonus of the shortest answer")
    top: float = Field(
        default=0.2, ge=0, le=1, description="share of the group that may get a bonus"
    )
    end: str = Field(
        default="</think>", min_length=1, description="the text that ends the thinking"
    )

    @property
    def sought(self) -> Mapping[str, str]:
        return {"end": self.end}

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        score = Outcomes.of(group, known.limit).right.astype(np.float64)
        parts = [response.text.partition(self.end) for response in group.group.responses]
        thinking = np.array([len(thought.strip()) for thought, _, _ in parts], dtype=np.float64)
        answer = np.array([len(rest.strip()) for _, _, rest in parts], dtype=np.float64)
        ranked = np.sort(score)[::-1]
        among = score >= ranked[max(0, int(self.top * len(score) + 1e-9) - 1)]
        return (
            score
            + self.thinking * _brevity(thinking)
            + self.answer * _brevity(answer)
            + self.thinking_bonus * _shortest(thinking, among)
            + self.answer_bonus * _shortest(answer, among)
        )


def _brevity(lengths: FloatArray) -> FloatArray:
    """Above 0 for those shorter than the mean, by the range of lengths; 0 if all are equal."""
    span = float(np.ptp(lengths))
    return (lengths.mean() - lengths) / span if span > 0 else np.zeros_like(lengths)


def _shortest(lengths: FloatArray, among: BoolArray) -> FloatArray:
    """1 for the shortest that is not empty, if it is `among` those that count."""
    shortest = np.min(lengths, initial=np.inf, where=lengths > 0)
    return (among & (lengths == shortest)).astype(np.float64)
