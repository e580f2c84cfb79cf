"""A lock between a thread that decodes token by token and others that pause or change it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Closable(Protocol):
    """A decoder, as far as the lock is concerned."""

    closed: bool


class PauseLock:
    """A lock that the decoding thread lets go of between tokens, and gives up to whoever asks for
    it.

    Plain locks are not fair: a thread that takes one again at once may keep others waiting for as
    long as it decodes.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._wanted_by: set[int] = set()  # threads that wait to change something
        self._paused_by: int | None = None

    @contextmanager
    def changing(self) -> Iterator[None]:
        """The time between two tokens, for as long as this lasts."""
        self._wanted_by.add(threading.get_ident())
        with self._condition:
            self._wanted_by.discard(threading.get_ident())
            try:
                yield
            finally:
                self._condition.notify_all()

    def pause(self) -> None:
        """No token is decoded from now on, until `resume`."""
        with self.changing():
            self._paused_by = threading.get_ident()

    def resume(self) -> None:
        with self.changing():
            self._paused_by = None

    @contextmanager
    def decoding(self, who: Closable) -> Iterator[None]:
        """The right to decode one token. Waits while another thread has paused or changes
        something, unless `who` is closed; RuntimeError if this very thread has paused, since it
        would wait for ever.
        """
        with self._condition:
            while (self._paused_by is not None or self._wanted_by) and not who.closed:
                if self._paused_by == threading.get_ident():
                    raise RuntimeError(
                        "the engine is paused: resume() before asking for more groups"
                    )
                self._condition.wait()
            yield
