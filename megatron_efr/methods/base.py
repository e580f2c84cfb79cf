"""What a method is, and the registry that finds one by name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any, ClassVar, Protocol

from megatron_efr.config import ConfigError, MethodConfig, Section
from megatron_efr.config.file import validate
from megatron_efr.types import BoolArray, Credit, Credited, FloatArray, Graded, IntArray, Rewarded

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

    def rewards(self, group: Graded) -> FloatArray:
        """Reward of each response, float64 [n], from a graded group."""
        raise TypeError(f"{type(self).__name__} defines no rewards")

    def credits(self, groups: Sequence[Rewarded]) -> list[Credit] | None:
        """What each group's responses are trained on; None: as the algorithm has it."""
        return None

    def rewarded(self, group: Graded) -> Rewarded:
        """The group's next stage."""
        return Rewarded(group, self.rewards(group))

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart, JSON-ready."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, and was handed {sorted(state)}")


class Credits(Protocol):
    """The part of an algorithm that turns rewards into advantages."""

    def credits(
        self, rewards: Sequence[FloatArray], lengths: Sequence[IntArray], limit: int
    ) -> Sequence[FloatArray]: ...

    def trains(self, truncated: BoolArray) -> BoolArray: ...


def credit(method: Method, algorithm: Credits, groups: Sequence[Rewarded], limit: int) -> list[Credited]:
    """An iteration's rewarded groups with their credits; `limit` as `Algorithm.credits` has it."""
    made = method.credits(groups)
    if made is None:
        rewards, lengths = [each.rewards for each in groups], [each.group.lengths for each in groups]
        made = [Credit(advantage) for advantage in algorithm.credits(rewards, lengths, limit)]
    return [
        Credited(group, each._replace(masked=~algorithm.trains(group.group.truncated)))
        for group, each in zip(groups, made, strict=True)
    ]


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
