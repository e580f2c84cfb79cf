"""Budgets told in the prompt: a question says how long its answer may be, and the reward holds the
answer to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from megatron_efr.config import RolloutConfig
from megatron_efr.methods.base import Ask, Known, Method, Needs, Visit
from megatron_efr.methods.plain import Outcomes, check_within, tells
from megatron_efr.types import FloatArray, Graded

Text = Annotated[str, tells("budget")]


class _Told(Method):
    """Draws a number of tokens for each visit of a prompt, and tells it after the question."""

    needs = Needs(samples=1)

    alpha: float = Field(default=3e-4, gt=0, description="price of a token of difference")
    shortest: PositiveInt = Field(default=100, description="least number of tokens that is told")
    longest: PositiveInt = Field(default=4000, description="largest number of tokens that is told")

    @model_validator(mode="after")
    def _shortest_is_below_longest(self) -> _Told:
        if self.shortest > self.longest:
            raise ValueError(
                f"method.shortest: {self.shortest} is above method.longest = {self.longest}"
            )
        return self

    def check(self, rollout: RolloutConfig) -> None:
        check_within(self.longest, rollout.max_new_tokens, "longest")

    def _budget(self, visit: Visit) -> tuple[int, np.random.Generator]:
        """The visit's budget, and what draws on: functions of the visit's seed alone."""
        drawing = np.random.default_rng(visit.seed)
        return int(drawing.integers(self.shortest, self.longest, endpoint=True)), drawing


class L1Exact(_Told):
    """L1-Exact: a number of tokens to think is told, and kept as exactly as can be.

        r = c - alpha |N - l|,  N an integer, uniform between `shortest` and `longest` for each
            visit of a prompt

    The question ends with `suffix`. Wrong and truncated responses pay for the difference too.
    Nothing is remembered: N is a function of the run's seed and the visit. The first release had
    alpha 1/3000.
    """

    source = "Aggarwal & Welleck 2025, arXiv 2503.04697; cmu-l3/l1@93dd330 math_reward.py:94-193"
    standing = "code"
    wrong_may_win = (
        "a right answer is 1 / alpha tokens (3,333) further from its budget than a wrong one"
    )

    suffix: Text = Field(
        default=" Think for {budget} tokens.", description="text added to the question"
    )

    def longest_asks(self, visit: Visit, known: Known) -> Sequence[Ask]:
        return [_asked(self.suffix, self.longest)]

    def ask(self, visit: Visit, known: Known) -> Ask:
        budget, _ = self._budget(visit)
        return _asked(self.suffix, budget)

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        seen = Outcomes.of(group, known.limit)
        return seen.right - self.alpha * np.abs(group.group.note["budget"] - seen.lengths)


class L1Max(_Told):
    """L1-Max: a largest number of tokens is told.

        paper:       r = c clip(alpha (N - l) + 0.5, 0, 1)
        multiplied:  r = c (clip(alpha (N - l), -1, 1) + 1) / 2
        added:       r = c + (clip(alpha (N - l), -1, 1) + 1) / 2

    N as in l1_exact. Of a share `exact` of the visits the question ends with `exact_suffix`, and
    l1_exact's reward holds. A wrong or truncated response earns 0, but under `added` and for exact
    budgets. Nothing is remembered. The released code has `multiplied` and `added`; its first
    release is `multiplied` with alpha 1/500, and exact_alpha 1/3000. Training starts from a model
    of l1_exact.
    """

    source = (
        "Aggarwal & Welleck 2025, arXiv 2503.04697; cmu-l3/l1@93dd330 and 966f7a1 math_reward.py"
    )
    standing = "code"
    wrong_may_win = "the budget is exact, as in l1_exact"

    form: Literal["paper", "multiplied", "added"] = Field(
        default="paper", description="form of the rule, of three"
    )
    exact_alpha: float | None = Field(
        default=None,
        gt=0,
        description=("price of a token of difference if the budget is exact; alpha when left out"),
    )
    exact: float = Field(
        default=0.5, ge=0, le=1, description="share of visits whose budget is exact"
    )
    suffix: Text = Field(
        default=" Think for maximum {budget} tokens.", description="text added to the question"
    )
    exact_suffix: Text = Field(
        default=" Think for {budget} tokens.", description="the same, of an exact budget"
    )

    def ask(self, visit: Visit, known: Known) -> Ask:
        budget, drawing = self._budget(visit)
        exact = bool(drawing.random() < self.exact)
        return _asked(self.exact_suffix if exact else self.suffix, budget, exact=exact)

    def longest_asks(self, visit: Visit, known: Known) -> Sequence[Ask]:
        said = [self.suffix] * (self.exact < 1) + [self.exact_suffix] * (self.exact > 0)
        return [_asked(suffix, self.longest) for suffix in said]

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        seen = Outcomes.of(group, known.limit)
        note = group.group.note
        if note["exact"]:
            return seen.right - (self.exact_alpha or self.alpha) * np.abs(
                note["budget"] - seen.lengths
            )
        left = self.alpha * (note["budget"] - seen.lengths)
        if self.form == "paper":
            return seen.right * np.clip(left + 0.5, 0.0, 1.0)
        share = (np.clip(left, -1.0, 1.0) + 1.0) / 2.0
        return seen.right * share if self.form == "multiplied" else seen.right + share


def _asked(suffix: str, budget: int, **noted: Any) -> Ask:
    return Ask(suffix=suffix.replace("{budget}", str(budget)), note={"budget": budget, **noted})
