"""torchrun that lets a run end by itself: `python -m megatron_efr.launch [torchrun's arguments] -m megatron_efr.train ...`

torchrun ends the workers 30 seconds after a SIGTERM, dies of SIGUSR1 and leaves them behind, and exits with 1 whatever
they answered. Here both signals are handed to the workers, which finish their iteration and save, and the exit code is
the first failed worker's: EXIT_REQUEUE of a run that was asked to end. Everything else is torchrun's.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType

import psutil
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megatron_efr.interruption import EXIT_REQUEUE, SIGNALS


class _Forward:
    """Hands a signal on to this process's workers; where none has been started yet, there is nothing to save."""

    def __init__(self) -> None:
        self.sent: set[int] = set()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        workers = psutil.Process().children()
        if not workers:
            sys.exit(EXIT_REQUEUE)
        print(f"launch: {signal.Signals(number).name}: the workers end after this iteration", file=sys.stderr, flush=True)
        self.sent.add(number)
        for worker in workers:
            worker.send_signal(number)


def exit_code(failed: ChildFailedError, sent: set[int]) -> int:
    """What the first worker that failed answered; a worker that one of the signals `sent` met while it was still
    importing has nothing to save, and asks for requeuing as well.
    """
    code = failed.get_first_failure()[1].exitcode
    if -code in sent:
        return EXIT_REQUEUE
    return code if code > 0 else 128 - code  # as shells have it: 128 + signal


def main(argv: Sequence[str] | None = None) -> None:
    """torchrun with its own arguments."""
    forward = _Forward()
    for number in SIGNALS:
        signal.signal(number, forward)
    try:
        torchrun.main(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *(sys.argv[1:] if argv is None else argv)])
    except ChildFailedError as failed:
        code = exit_code(failed, forward.sent)
        if code != EXIT_REQUEUE:
            print(failed, file=sys.stderr, flush=True)
        sys.exit(code)


if __name__ == "__main__":
    main()
