"""What a method is, and the registry that finds one by name."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any, ClassVar

import numpy as np

from megatron_efr.config import ConfigError, MethodConfig, Section
from megatron_efr.config.file import validate
from megatron_efr.methods.rloo import rloo
from megatron_efr.types import Group

ENTRY_POINT = "megatron_efr.methods"


class Method:
    """Turns groups into rewards, and rewards into one advantage per response.

    Subclass it, declare `Options`, implement `rewards`, and register the class under the entry point
    `megatron_efr.methods`. Both functions are pure: what a method remembers between iterations lives in what
    `state_dict` returns, and is checkpointed.
    """

    Options: ClassVar[type[Section]] = Section  # the method's own keys of the `method` section
    min_samples: ClassVar[int] = 2  # RLOO's baseline is the mean of the *other* samples

    def __init__(self, options: Any) -> None:
        self.options = options

    def rewards(self, group: Group) -> np.ndarray:
        """Reward of each response, float64 [n], from a graded group."""
        raise TypeError(f"{type(self).__name__} defines no rewards")

    def advantages(self, groups: list[Group]) -> list[np.ndarray]:
        """One advantage per response, float64 [n] for each rewarded group; RLOO unless a method says otherwise."""
        return [rloo(_filled(group.rewards)) for group in groups]

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart, JSON-ready."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, and was handed {sorted(state)}")


def score(method: Method, groups: list[Group]) -> None:
    """Fill `rewards` and `advantages` of graded groups in place."""
    for group in groups:
        group.rewards = method.rewards(group)
    for group, advantages in zip(groups, method.advantages(groups), strict=True):
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
    return kind(validate(kind.Options, config.options, "configuration", prefix="method"))


def _filled(rewards: np.ndarray | None) -> np.ndarray:
    if rewards is None:
        raise ValueError("advantages asked for before rewards were given")
    return rewards
