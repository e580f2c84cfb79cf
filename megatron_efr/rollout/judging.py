"""Finished groups are graded in a thread of their own while others are being generated: all that
wait, at once.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

from megatron_efr.types import Group, Rewarded

Accept = Callable[[Sequence[Group]], Sequence[Rewarded | None]]
"""Grades and rewards groups; None in the place of one that is refused for its content, and is
replaced.
"""


class Judged(NamedTuple):
    """The group of a request's seed, accepted, or refused (None)."""

    seed: int
    rewarded: Rewarded | None


class Judge:
    """The groups of one iteration on their way through `accept`, which the one thread of `executor`
    runs.

    `waiting` are the seeds of those that are not judged yet. They are judged in the order in which
    they came.
    """

    def __init__(self, accept: Accept, executor: Executor) -> None:
        self.waiting: set[int] = set()
        self._accept, self._executor = accept, executor
        self._groups: deque[Group] = deque()
        self._judged: queue.SimpleQueue[Judged | Exception] = queue.SimpleQueue()

    def add(self, group: Group) -> None:
        """Have a finished group judged."""
        self.waiting.add(group.seed)
        self._groups.append(group)
        self._executor.submit(self._judge)

    def next(self, *, wait: bool) -> Judged | None:
        """The next verdict. Without `wait`, None if there is none yet. What `accept` raised is
        raised here.
        """
        try:
            judged = self._judged.get(block=wait)
        except queue.Empty:
            return None
        if isinstance(judged, Exception):
            raise judged
        self.waiting.remove(judged.seed)
        return judged

    def _judge(self) -> None:
        """Judge all that came since the last call: a pool of graders shares them out."""
        groups = [self._groups.popleft() for _ in range(len(self._groups))]
        try:
            accepted = self._accept(groups) if groups else []
            for group, rewarded in zip(groups, accepted, strict=True):
                self._judged.put(Judged(group.seed, rewarded))
        except Exception as error:  # the thread that waits for a verdict must hear of it
            self._judged.put(error)
