"""The training prompts' stream of groups: fed while it runs, asked from whichever thread produces,
held on request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from megatron_efr.errors import EngineError
from megatron_efr.rollout.engine import Engine, GroupStream
from megatron_efr.rollout.local.pause import PauseLock
from megatron_efr.types import Group, Request, Sampling


class Feed(Iterator[Request]):
    """Requests in the order they were added; dry, and asked again, until there are more."""

    def __init__(self) -> None:
        self._requests: deque[Request] = deque()

    def add(self, requests: Iterable[Request]) -> None:
        self._requests.extend(requests)

    def __next__(self) -> Request:
        if not self._requests:
            raise StopIteration
        return self._requests.popleft()


class GroupFeed:
    """Requests in, finished groups out. What is in flight stays in flight between calls of `next`.

    `ask` and `next` belong to one thread at a time, which touches neither CUDA nor collectives as
    long as the engine does not; `held` and `close` are another's.
    """

    def __init__(self, engine: Engine, sampling: Sampling) -> None:
        self.engine = engine
        self.closed = False
        self._sampling = sampling
        self._pause_lock = PauseLock()
        self._feed = Feed()
        self._stream = None
        self._in_flight: set[int] = set()

    _stream: GroupStream | None

    def ask(self, requests: Iterable[Request]) -> None:
        """Ask for the groups of those requests (by their seeds) that are not in flight already."""
        fresh = [request for request in requests if request.seed not in self._in_flight]
        if not self._in_flight and fresh:
            self._feed = Feed()
            self._stream = self.engine.generate(self._feed, self._sampling)
        self._feed.add(fresh)
        self._in_flight |= {request.seed for request in fresh}

    def next(self) -> Group:
        """The next group to be finished. RuntimeError if the stream ends before all that was asked
        is answered.

        After an EngineError nothing is in flight any more, and can be asked again.
        """
        with self._pause_lock.decoding(self):
            if self.closed or self._stream is None:
                raise RuntimeError("the feed of groups is closed, or nothing was asked of it")
            try:
                group = next(self._stream, None)
            except EngineError:
                self._in_flight.clear()
                raise
        if group is None:
            raise RuntimeError(
                f"the engine's stream of groups ended with {len(self._in_flight)} prompts "
                "unanswered"
            )
        self._in_flight.remove(group.seed)
        return group

    def held(self) -> AbstractContextManager[Any]:
        """The engine between two groups, for another thread to ask it something else meanwhile."""
        return self._pause_lock.changing()

    def close(self) -> None:
        """Drop what is in flight; a thread that waits in `next` gets an error."""
        self.closed = True
        if self._stream is not None:
            self._stream.close()
