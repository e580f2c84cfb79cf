"""SIGTERM and SIGUSR1: the run ends after the iteration at hand, with a checkpoint and a code that asks for requeuing.

SLURM sends SIGUSR1 some time before a job's limit (`--signal`), SIGTERM before it is preempted.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

EXIT_REQUEUE = 75
"""Exit code of a run that was asked to end, saved, and goes on with --resume (sysexits.h: EX_TEMPFAIL, try again)."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Within it the process outlives SIGNALS and remembers the first. Only the main thread can enter it.

    `received` is the signal, None while there was none. One rank may know before another does: let ranks agree on it.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
