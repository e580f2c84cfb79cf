"""History of each prompt: one store for all methods, in the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from megatron_efr.types import Graded


class Seen(NamedTuple):
    """History of one prompt.

    visits: iterations that trained on it. responses, right: of all visits together. right_tokens:
    of the right responses together. shortest_right: tokens of the shortest right response; None:
    none was right. last_step: the iteration of the last visit.
    """

    visits: int
    responses: int
    right: int
    right_tokens: int
    shortest_right: int | None
    last_step: int

    @property
    def solved(self) -> float:
        """Share of right responses, 0 to 1."""
        return self.right / self.responses

    @property
    def mean_right(self) -> float | None:
        """Mean tokens of a right response; None if none was right."""
        return self.right_tokens / self.right if self.right else None


History = Mapping[str, Seen]
"""By the id of a prompt."""


def visited(history: History, groups: Iterable[Graded], step: int) -> History:
    """The history after iteration `step`; the one given stays as it is."""
    after = dict(history)
    for graded in groups:
        name = graded.group.prompt.id
        after[name] = _after(after.get(name), graded, step)
    return MappingProxyType(after)


def _after(before: Seen | None, graded: Graded, step: int) -> Seen:
    right = graded.correct & ~graded.group.truncated
    tokens: Any = graded.group.lengths[right].tolist()
    before = before or Seen(0, 0, 0, 0, None, step)
    held = [] if before.shortest_right is None else [before.shortest_right]
    return Seen(
        visits=before.visits + 1,
        responses=before.responses + len(right),
        right=before.right + int(np.count_nonzero(right)),
        right_tokens=before.right_tokens + sum(tokens),
        shortest_right=min([*held, *tokens], default=None),
        last_step=step,
    )


def dump_history(history: History) -> dict[str, list[int | None]]:
    """A history as JSON has it."""
    return {name: list(seen) for name, seen in history.items()}


def load_history(stored: Mapping[str, Iterable[Any]]) -> History:
    """The history that `dump_history` wrote."""
    return MappingProxyType({name: Seen(*seen) for name, seen in stored.items()})
