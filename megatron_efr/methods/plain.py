"""Plain rules: the rewards of a group are a function of who was right, and how long each response
is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from pydantic import AfterValidator

from megatron_efr.config import ConfigError
from megatron_efr.methods.base import Choices, Known, Method
from megatron_efr.types import BoolArray, FloatArray, Graded

UNANSWERED = frozenset({"no_answer", "truncated"})
"""Verdicts on responses that gave no answer."""


class Outcomes(NamedTuple):
    """One group as plain rules see it, [n] each.

    right: answered correctly, and ended by itself. lengths: tokens, float64. truncated: cut off at
    the limit. answered: an answer was found, right or wrong. limit: the most tokens of a response;
    None: not known.
    """

    right: BoolArray
    lengths: FloatArray
    truncated: BoolArray
    answered: BoolArray
    limit: int | None

    @classmethod
    def of(cls, graded: Graded, limit: int) -> Outcomes:
        truncated = graded.group.truncated
        answered = np.array([grade.status not in UNANSWERED for grade in graded.grades], dtype=bool)
        lengths = graded.group.lengths.astype(np.float64)
        return cls(graded.correct & ~truncated, lengths, truncated, answered & ~truncated, limit)

    @property
    def accuracy(self) -> float:
        """Share of right responses."""
        return float(self.right.mean())

    @property
    def right_lengths(self) -> FloatArray:
        """Tokens of the right responses, [number right]."""
        return self.lengths[self.right]


class Plain(Method):
    """A method whose one hook is a plain rule."""

    def rule(self, group: Outcomes) -> FloatArray:
        """Reward of each response, float64 [n]; TypeError if the method defines none."""
        raise TypeError(f"{type(self).__name__} defines no rule")

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        return self.rule(Outcomes.of(group, known.limit))


def tells(name: str) -> AfterValidator:
    """Validator of a text that must hold `{name}`, which is replaced; ValueError without it."""

    def check(text: str) -> str:
        if f"{{{name}}}" not in text:
            raise ValueError(
                f"the text tells nothing without {{{name}}}; put that where it is to stand"
            )
        return text

    return AfterValidator(check)


def limit_of(option: int | None, group: Outcomes, key: str) -> int:
    """A limit in tokens that an option may give, and is the rollouts' otherwise; ConfigError if
    neither is known.
    """
    found = option or group.limit
    if found is None:
        raise ConfigError(f"{key}: not set, and no max_new_tokens is given; give one of them")
    return found


def check_within(value: int | None, limit: int, key: str, *, strictly: bool = False) -> None:
    """Refuse an option in tokens that is above any response's; ConfigError. `strictly`: nor may it
    equal the limit.
    """
    if value is not None and (value > limit or (strictly and value == limit)):
        least = "less than" if strictly else "at most"
        raise ConfigError(
            f"method.{key}: {value} tokens, and no response has more than rollout.max_new_tokens "
            f"= {limit}; set it to {least} that"
        )


def check_no_soft_penalty(algorithm: Choices, name: str) -> None:
    """Refuse an algorithm that punishes long responses beside a method that does so itself;
    ConfigError.
    """
    if algorithm.truncated == "soft":
        raise ConfigError(
            f"algorithm.truncated: soft punishes what comes near the limit, and method {name} "
            "does so already; set algorithm.truncated: wrong"
        )
