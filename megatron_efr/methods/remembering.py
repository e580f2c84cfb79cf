"""Methods that remember: earlier lengths of a prompt, earlier accuracies, or a price on tokens that
follows both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from megatron_efr.config import RolloutConfig
from megatron_efr.methods.base import Known, Method, Needs, State
from megatron_efr.methods.plain import Outcomes, check_within
from megatron_efr.types import FloatArray, Graded, Rewarded


def outcomes(groups: Sequence[Rewarded], known: Known) -> list[Outcomes]:
    """An iteration's groups as plain rules see them."""
    return [Outcomes.of(group.graded, known.limit) for group in groups]


class HAPO(Method):
    """HAPO: a response is measured by the shortest right one that its prompt ever had.

        h = that length, of earlier iterations;  f = cos(pi/2 l / h) if l < 2 h, else -1
        r = c + weight max(least, f) if right, c + weight min(0, f) if wrong;
            r = c if there was no right one yet

    A wrong or truncated response pays for being longer than h, and earns nothing for being shorter.
    The history of prompts is remembered, and a prompt that a run visits once is never shortened.
    `history: mean` measures by the mean of all right ones, an option of the source.
    """

    source = "Huang et al. 2025, arXiv 2505.11225; HCY123902/HAPO@c91ae3b utils.py:34-52"
    standing = "code"
    wrong_may_win_if = "`weight` times -`least` is above 1"

    needs = Needs(samples=1)

    weight: float = Field(default=1.0, ge=0, description="weight of the length's part")
    least: float = Field(
        default=-0.7, ge=-1, le=0, description="the least that a right answer's length may earn"
    )
    history: Literal["shortest", "mean"] = Field(
        default="shortest", description="length taken from a prompt's right responses so far"
    )

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        now = Outcomes.of(group, known.limit)
        before = known.history.get(group.group.prompt.id)
        if before is None or before.shortest_right is None or before.mean_right is None:
            return now.right.astype(np.float64)
        taken = before.shortest_right if self.history == "shortest" else before.mean_right
        brevity = np.where(now.lengths < 2 * taken, np.cos(np.pi / 2 * now.lengths / taken), -1.0)
        return now.right + self.weight * np.where(
            now.right, np.maximum(self.least, brevity), np.minimum(brevity, 0.0)
        )


class ShortRL(Method):
    """Short-RL: right answers are shortened while the iteration is about as accurate as the best
    one was.

        base = right, wrong, or missing without an answer; + form with an answer, - form without
        length = 0.5 if l <= lmin_C + tolerance, else 0.5 - (l - lmin_C) / (lmax_C - lmin_C + 1e-5)
        r = base + length for right answers, if the accuracy of the iteration >= best - slack

    lmin_C and lmax_C are of the group's right answers. A wrong or truncated response gets no length
    part; a truncated one has no answer. The best accuracy of an iteration is remembered, this one
    included. The released dispatcher cannot call its own rule; that is not copied. Logic puzzles
    have a tolerance of 200.
    """

    source = (
        "Yuan et al. 2025, arXiv 2505.12284; lblankl/Short-RL@07cea8a rewards/ShortRL.py:229-282"
    )
    standing = "code"
    wrong_may_win_if = "`right` is less than 0.5 above `wrong` or `missing`"

    tolerance: int = Field(
        default=100, ge=0, description="tokens above the shortest right answer that cost nothing"
    )
    slack: float = Field(
        default=0.05, ge=0, le=1, description="accuracy below the best that still shortens"
    )
    right: float = Field(default=2.0, description="base of a right answer")
    wrong: float = Field(default=-1.5, description="base of a wrong answer")
    missing: float = Field(default=-2.0, description="base of a response without an answer")
    form: float = Field(
        default=1.0,
        ge=0,
        description="reward of a response's form: added with an answer, taken off without",
    )

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        seen = Outcomes.of(group, known.limit)
        base = np.where(seen.right, self.right, np.where(seen.answered, self.wrong, self.missing))
        return base + np.where(seen.answered, self.form, -self.form)

    def settle(self, groups: Sequence[Rewarded], known: Known) -> Sequence[Rewarded]:
        seen = outcomes(groups, known)
        accuracy = _accuracy(seen)
        # shares that differ by the slack do not round
        if accuracy < known.state.get("best", 0.0) - self.slack - 1e-9:
            return groups
        pairs = zip(groups, seen, strict=True)
        return [
            replace(group, rewards=group.rewards + self._brevity(each)) for group, each in pairs
        ]

    def learn(self, state: State, groups: Sequence[Rewarded], known: Known) -> State:
        return {"best": max(state.get("best", 0.0), _accuracy(outcomes(groups, known)))}

    def _brevity(self, group: Outcomes) -> FloatArray:
        if not group.right.any():
            return np.zeros_like(group.lengths)
        shortest = group.right_lengths.min()
        longest = group.right_lengths.max()
        share = (group.lengths - shortest) / (longest - shortest + 1e-5)
        within = group.lengths <= shortest + self.tolerance
        return np.where(group.right, np.where(within, 0.5, 0.5 - share), 0.0)


class LEASH(Method):
    """LEASH: a price on tokens over the target, which rises while responses are longer than it, and
    falls after.

        r = clip(+-1 - lambda max(0, l / target - 1), -1, 1)
        lambda = clip(lambda + rate (m / target - 1), least, most) after the iteration,
            m = mean (or largest) length

    A wrong or truncated response earns -1. lambda is remembered. The source: target 4096 and start
    0.1 for 1.5B, 12288 and 0.2 for 4B.
    """

    source = (
        "Li et al. 2025, arXiv 2512.21540; YanhaoLi-Cc/LEASH@bb5aa65 "
        "recipe/leash/leash_reward_manager.py"
    )
    standing = "code"

    needs = Needs(samples=1)

    target: PositiveInt = Field(default=4096, description="target in tokens")
    start: float = Field(default=0.1, ge=0, description="starting lambda")
    rate: float = Field(default=0.005, ge=0, description="rate at which lambda follows")
    least: float = Field(default=0.0, ge=0, description="lambda's lower bound")
    most: float = Field(default=1.0, ge=0, description="lambda's upper bound")
    over: Literal["mean", "max"] = Field(
        default="mean", description="the length that the target is held against"
    )

    @model_validator(mode="after")
    def _bounds_hold_the_start(self) -> LEASH:
        if not self.least <= self.start <= self.most:
            raise ValueError(
                f"method.start: {self.start:g} is not between method.least = {self.least:g} and "
                f"method.most = {self.most:g}"
            )
        return self

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        seen = Outcomes.of(group, known.limit)
        price = known.state.get("lambda", self.start) * np.maximum(
            0.0, seen.lengths / self.target - 1.0
        )
        return np.clip(np.where(seen.right, 1.0, -1.0) - price, -1.0, 1.0)

    def learn(self, state: State, groups: Sequence[Rewarded], known: Known) -> State:
        lengths = np.concatenate([each.lengths for each in outcomes(groups, known)])
        length = lengths.mean() if self.over == "mean" else lengths.max()
        price = state.get("lambda", self.start) + self.rate * (length / self.target - 1.0)
        return {"lambda": float(np.clip(price, self.least, self.most))}

    def check(self, rollout: RolloutConfig) -> None:
        check_within(self.target, rollout.max_new_tokens, "target", strictly=True)


class ADLP(Method):
    """A-DLP: a price on every token, which rises while the model is more accurate than a reference,
    and falls after.

        r = c - lambda l
        lambda = max(0, lambda + rate (accuracy - reference)) after the iteration

    Wrong and truncated responses pay alike, and nothing is clipped: at 8,000 tokens the price is 8
    at first. lambda is remembered.
    """

    source = "Su and Cardie 2025, arXiv 2505.18298; JinyanSu1/A-DLP@afbc411 main_ppo.py:136-147"
    standing = "code"
    wrong_may_win = "a right answer is 1 / lambda tokens (1,000 at first) longer than a wrong one"

    needs = Needs(samples=1)

    start: float = Field(default=1e-3, ge=0, description="starting lambda")
    rate: float = Field(default=1e-3, ge=0, description="rate at which lambda follows")
    reference: float = Field(
        default=0.62, ge=0, le=1, description="accuracy that is held: the starting model's"
    )

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        seen = Outcomes.of(group, known.limit)
        return seen.right - known.state.get("lambda", self.start) * seen.lengths

    def learn(self, state: State, groups: Sequence[Rewarded], known: Known) -> State:
        above = _accuracy(outcomes(groups, known)) - self.reference
        return {"lambda": max(0.0, state.get("lambda", self.start) + self.rate * above)}


class Acoer(Method):
    """Acoer: a bonus for right answers within a budget; bonus and budget follow accuracy and
    length.

        r = c (1 + alpha log(1 + 5 (1 - min(l / budget, 1))) / log 6)
        accuracy, length: running means of the iterations' accuracies and mean right lengths,
            of weight 2/51
        after `warmup` iterations: alpha 0.95 alpha, at least 0.01,
            if accuracy is more than 0.02 below what it was
        `lookback` iterations ago, else 1.02 alpha, at most 0.5;
            budget = max(least_budget, 0.85 length)

    A wrong or truncated response earns 0. alpha, budget, both means and the last accuracies are
    remembered. The released code counts characters of the thinking part, 4 to a token: 16,384 at
    first and 2,048 at least. An iteration without a right answer leaves the mean length as it is;
    the released code takes in a 0, and is trained with a reward of 0 or 1 for form besides, which
    is not built.
    """

    source = "arXiv 2606.22716; js-lee-AI/ACOER@d13bb6b acoer/reward.py"
    standing = "code"

    needs = Needs(samples=1)

    start: float = Field(default=0.02, ge=0, description="alpha at first")
    budget: PositiveInt = Field(default=4096, description="tokens at first")
    least_budget: PositiveInt = Field(
        default=512, description="tokens that the budget keeps at least"
    )
    warmup: int = Field(default=200, ge=0, description="iterations before anything follows")
    lookback: PositiveInt = Field(
        default=100, description="iterations back with which accuracy is compared"
    )

    @model_validator(mode="after")
    def _budget_is_not_below_its_least(self) -> Acoer:
        if self.budget < self.least_budget:
            raise ValueError(
                f"method.budget: {self.budget} is below method.least_budget = {self.least_budget}"
            )
        return self

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        seen = Outcomes.of(group, known.limit)
        saved = 1.0 - np.minimum(seen.lengths / known.state.get("budget", self.budget), 1.0)
        return seen.right * (
            1.0 + known.state.get("alpha", self.start) * np.log1p(5.0 * saved) / np.log(6.0)
        )

    def learn(self, state: State, groups: Sequence[Rewarded], known: Known) -> State:
        seen = outcomes(groups, known)
        right = np.concatenate([each.right_lengths for each in seen])
        accuracy = _follow(state.get("accuracy"), _accuracy(seen))
        length = (
            _follow(state.get("length"), float(right.mean())) if len(right) else state.get("length")
        )
        alpha, budget = state.get("alpha", self.start), state.get("budget", self.budget)
        before = state.get("accuracies", [])
        if known.step > self.warmup and len(before) >= self.lookback:
            fell = accuracy < before[-self.lookback] - 0.02
            alpha = max(0.01, 0.95 * alpha) if fell else min(0.5, 1.02 * alpha)
            if length is not None:
                budget = max(float(self.least_budget), 0.85 * length)
        accuracies = [*before, accuracy][-self.lookback :]
        return {
            "alpha": alpha,
            "budget": budget,
            "accuracy": accuracy,
            "length": length,
            "accuracies": accuracies,
        }


def _follow(mean: float | None, value: float) -> float:
    """A running mean that takes in `value` with a weight of 2/51."""
    return value if mean is None else 2 / 51 * value + 49 / 51 * mean


def _accuracy(groups: Sequence[Outcomes]) -> float:
    """Share of right responses of all groups."""
    return float(np.concatenate([group.right for group in groups]).mean())
