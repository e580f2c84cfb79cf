"""torchrun that lets a run end by itself: `python -m megatron_efr.torchrun [as torchrun] -m
megatron_efr.train ...`

torchrun ends the workers 30 seconds after a SIGTERM, dies of SIGUSR1 and leaves them behind, and
exits with 1 whatever they answered. Here both signals are handed to the workers, which finish their
iteration and save, and the exit code is the first failed worker's: EXIT_REQUEUE of a run that was
asked to end. Ctrl-C ends all of them with 130 and one line. Everything else is torchrun's.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import psutil
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megatron_efr.parent import LAUNCHER, end_with_parent
from megatron_efr.run.interruption import EXIT_REQUEUE, SIGNALS


def forward(number: int, frame: FrameType | None) -> None:
    """Hand a signal on to this process's workers; if there are none, there is nothing to save."""
    workers = psutil.Process().children()
    if not workers:
        sys.exit(exit_code(-number))
    print(
        f"launch: {signal.Signals(number).name}: the workers end after this iteration",
        file=sys.stderr,
        flush=True,
    )
    for worker in workers:
        worker.send_signal(number)


def exit_code(code: int) -> int:
    """The answer for a worker's `code`, which is minus the signal if one ended it.

    SIGUSR1 asks for requeuing even if it met a worker that was still importing. SIGTERM does not:
    it also comes to all when one of them failed, and the failed run must not be queued again and
    again.
    """
    if code == -signal.SIGUSR1:
        return EXIT_REQUEUE
    return code if code >= 0 else 128 - code  # as shells have it: 128 + signal


def main(argv: Sequence[str] | None = None) -> None:
    """torchrun with its own arguments."""
    end_with_parent()
    os.environ[LAUNCHER] = str(os.getpid())  # the workers', which are to end with it
    for number in SIGNALS:
        signal.signal(number, forward)
    try:
        torchrun.main(
            [
                "--signals-to-handle",
                "SIGINT,SIGHUP,SIGQUIT",
                *(sys.argv[1:] if argv is None else argv),
            ]
        )
    except ChildFailedError as failed:
        code = exit_code(failed.get_first_failure()[1].exitcode)
        if code != EXIT_REQUEUE:
            print(failed, file=sys.stderr, flush=True)
        sys.exit(code)
    except SignalException as ended:  # torchrun's, of the signals that it was told to handle
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + ended.sigval)
    except KeyboardInterrupt:  # before or after it handled them
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
