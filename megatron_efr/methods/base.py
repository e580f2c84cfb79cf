"""What a method is, and the registry that finds one by name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any, ClassVar, Protocol

import numpy as np

from megatron_efr.config import ConfigError, MethodConfig, Section
from megatron_efr.config.file import validate
from megatron_efr.types import Group

ENTRY_POINT = "megatron_efr.methods"


class Method:
    """Turns groups into rewards, one per response.

    Subclass it, declare `Options`, implement `rewards`, and register the class under the entry point
    `megatron_efr.methods`. They are pure: what a method remembers between iterations lives in what
    `state_dict` returns, and is checkpointed.
    """

    Options: ClassVar[type[Section]] = Section  # the method's own keys of the `method` section
    min_samples: ClassVar[int] = 2

    def __init__(self, options: Any) -> None:
        self.options = options

    def rewards(self, group: Group) -> np.ndarray:
        """Reward of each response, float64 [n], from a graded group."""
        raise TypeError(f"{type(self).__name__} defines no rewards")

    def advantages(self, groups: list[Group]) -> list[np.ndarray] | None:
        """One advantage per response, float64 [n] for each rewarded group; None: as the algorithm has them."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart, JSON-ready."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, and was handed {sorted(state)}")


class Credits(Protocol):
    """The part of an algorithm that turns rewards into advantages."""

    def credits(self, rewards: Sequence[np.ndarray], lengths: Sequence[np.ndarray], limit: int) -> list[np.ndarray]: ...

    def trains(self, truncated: np.ndarray) -> np.ndarray: ...


def score(method: Method, algorithm: Credits, groups: list[Group], limit: int) -> None:
    """Fill `rewards`, `advantages` and `masked` of graded groups in place; `limit` as `Algorithm.credits` has it."""
    rewards = [method.rewards(group) for group in groups]
    for group, each in zip(groups, rewards, strict=True):
        group.rewards, group.masked = each, ~algorithm.trains(group.truncated)
    made = method.advantages(groups)
    if made is None:
        made = algorithm.credits(rewards, [group.lengths for group in groups], limit)
    for group, advantages in zip(groups, made, strict=True):
        group.advantages = advantages


def available() -> dict[str, type[Method]]:
    """Every registered method by name: ours, and those of installed third parties."""
    return {entry.name: entry.load() for entry in entry_points(group=ENTRY_POINT)}


def build(config: MethodConfig, samples: int) -> Method:
    """The configured method; ConfigError for an unknown name, a wrong option, or too few samples per prompt."""
    registered = available()
    if config.name not in registered:
        raise ConfigError(f"method.name: no method {config.name!r}; registered: {', '.join(sorted(registered))}")
    kind = registered[config.name]
    if samples < kind.min_samples:
        raise ConfigError(
            f"rollout.samples: {samples} response(s) per prompt, and {config.name} compares responses of one prompt: "
            f"it needs at least {kind.min_samples}"
        )
    return kind(validate(kind.Options, config.options, prefix="method"))
