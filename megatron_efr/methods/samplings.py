"""Samplings beside rollouts: the starting model's responses, and a monitor set's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from megatron_efr.types import Graded


class Sampled(NamedTuple):
    """Responses to one prompt: the tokens of each, and which were right and ended by themselves,
    [n] each.
    """

    lengths: tuple[int, ...]
    right: tuple[bool, ...]

    @classmethod
    def of(cls, graded: Graded) -> Sampled:
        """The part of a graded group that is kept."""
        group = graded.group
        right = graded.correct & ~group.truncated
        return cls(tuple(map(int, group.lengths)), tuple(map(bool, right)))

    @property
    def solved(self) -> float:
        """Share of right responses, 0 to 1."""
        return sum(self.right) / len(self.right)

    @property
    def mean_length(self) -> float:
        """Mean tokens of a response, right or wrong."""
        return sum(self.lengths) / len(self.lengths)


ByPrompt = Mapping[str, Sampled]
"""By the id of a prompt."""

NONE: ByPrompt = MappingProxyType({})


class Monitor(NamedTuple):
    """A monitor set: `prompts` of the training prompts at most, drawn by the run's seed, each asked
    for `samples` responses before the first iteration, and after every so many. held_out: of
    evaluation.datasets' instead.
    """

    prompts: int
    samples: int
    every: int
    held_out: bool = False


class Samplings(NamedTuple):
    """Samplings that a method wants.

    reference: responses of the starting model to each training prompt; 0: none.
    """

    reference: int = 0
    monitor: Monitor | None = None

    @property
    def held_out(self) -> bool:
        """True if problems of evaluation.datasets are sampled."""
        return self.monitor is not None and self.monitor.held_out


def dump(sampled: ByPrompt) -> dict[str, Any]:
    """Samplings as JSON has them."""
    return {
        name: [list(each.lengths), [int(right) for right in each.right]]
        for name, each in sampled.items()
    }


def load(stored: Mapping[str, Iterable[Any]]) -> ByPrompt:
    """The samplings that `dump` wrote. ValueError or TypeError for anything else."""
    return MappingProxyType({name: restored(*each) for name, each in stored.items()})


def restored(lengths: Iterable[Any], right: Iterable[Any]) -> Sampled:
    """One prompt's responses from JSON's lists. ValueError or TypeError for others than `dump`
    writes.
    """
    made = Sampled(tuple(map(int, lengths)), tuple(map(bool, right)))
    if not made.lengths or len(made.lengths) != len(made.right) or min(made.lengths) < 1:
        raise ValueError(
            f"{len(made.lengths)} lengths and {len(made.right)} verdicts are no responses"
        )
    return made
