"""SIGTERM and SIGUSR1: the run ends after the iteration at hand, with a checkpoint and a code that
asks for requeuing.

SLURM sends SIGUSR1 some time before a job's limit (`--signal`), SIGTERM before it is preempted.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

EXIT_REQUEUE = 75
"""Exit code of a run that was asked to end, saved, and goes on with --resume (sysexits.h:
EX_TEMPFAIL, try again).
"""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Within it the process outlives SIGNALS, and those in `also` that it does not ignore, and
    remembers them.

    `received` is the signal that asked it to end, None while there was none; `insisted` the next
    one after it. SIGUSR1 only announces the other: that one then asks, and does not insist. One
    rank may know before another does: let ranks agree on it. Only the main thread can enter it.
    """

    def __init__(self, *also: signal.Signals) -> None:
        self.received: signal.Signals | None = None
        self.insisted: signal.Signals | None = None
        self._also = also
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        # as under nohup
        heeded = [number for number in self._also if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {
            number: signal.signal(number, self._remember) for number in (*SIGNALS, *heeded)
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received in (None, signal.SIGUSR1):
            self.received = signal.Signals(number)
        elif number != signal.SIGUSR1:
            self.insisted = signal.Signals(number)
