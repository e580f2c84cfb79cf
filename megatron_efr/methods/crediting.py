"""From graded groups to rewarded ones, and on to credited ones: the method's own credits, or the
algorithm's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from megatron_efr.config import ConfigError
from megatron_efr.methods.base import Known, Method
from megatron_efr.types import BoolArray, Credit, Credited, FloatArray, Graded, IntArray, Rewarded


class Credits(Protocol):
    """The part of an algorithm that turns rewards into advantages."""

    def credits(
        self, rewards: Sequence[FloatArray], lengths: Sequence[IntArray], limit: int
    ) -> Sequence[FloatArray]: ...

    def passes(self, rewards: FloatArray) -> BoolArray: ...

    def trains(self, truncated: BoolArray) -> BoolArray: ...


def reward(method: Method, group: Graded, known: Known) -> Rewarded:
    """A graded group and its rewards; ConfigError if the method gives another number of them."""
    rewards = np.asarray(method.rewards(group, known), dtype=np.float64)
    if rewards.shape != (len(group.grades),):
        raise ConfigError(
            f"method.name: {type(method).__name__} gave rewards of shape {list(rewards.shape)} for "
            f"{len(group.grades)} responses"
        )
    return Rewarded(group, rewards)


def credit(
    method: Method, algorithm: Credits, groups: Sequence[Rewarded], known: Known
) -> list[Credited]:
    """An iteration's rewarded groups with the rewards that count, and their credits."""
    groups = method.settle(groups, known)
    made = method.credits(groups, known)
    if made is None:
        rewards, lengths = (
            [each.rewards for each in groups],
            [each.group.lengths for each in groups],
        )
        advantages = algorithm.credits(rewards, lengths, known.limit)
        made = [
            Credit(
                advantage,
                weight=method.weights(group, known),
                masked=~algorithm.passes(group.rewards),
            )
            for group, advantage in zip(groups, advantages, strict=True)
        ]
    return [
        Credited(
            group, each._replace(masked=_masked(each, algorithm.trains(group.group.truncated)))
        )
        for group, each in zip(groups, made, strict=True)
    ]


def _masked(credit: Credit, trained: BoolArray) -> BoolArray:
    """Responses that either the method or the algorithm leaves out of the loss, bool [n]."""
    return ~trained if credit.masked is None else credit.masked | ~trained
