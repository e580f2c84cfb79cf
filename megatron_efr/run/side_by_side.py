"""Programs of a sweep, several at a time: their output told apart, all ended with the sweep.

Each is in a process group of its own, so that Ctrl-C comes to the sweep alone, which then lets them
save.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path

from megatron_efr.durable import writing
from megatron_efr.errors import UserError
from megatron_efr.parent import LAUNCHER
from megatron_efr.run.interruption import EXIT_REQUEUE, SIGNALS, Interruption

END_WITHIN_S = 1800.0
"""Seconds in which programs that were asked to end finish and save; then they are killed."""

_POLL_S = 0.1
# ended by the signal
_AS_ASKED = {EXIT_REQUEUE, *(code for number in SIGNALS for code in (-number, 128 + number))}


class FailedError(UserError):
    """Programs that failed, `names`, after all others have ended."""

    def __init__(self, names: Sequence[str], logs: Path) -> None:
        super().__init__(f"{', '.join(names)} failed; see {logs}")
        self.names = names


Command = tuple[str, list[str]]
"""A program's name, and its words."""


def side_by_side(
    commands: Sequence[Command],
    logs: Path,
    jobs: int,
    ended: Callable[[str, bool], Iterable[Command]] = lambda name, well: (),
) -> None:
    """Run named commands, `jobs` at a time; `ended` gets the name of each that has ended, and if it
    did well, and says what may begin thereafter, behind all that already wait.

    FailedError names those that failed, once all have ended.

    SIGTERM, SIGUSR1 or Ctrl-C: no other begins, those that run are asked to end and waited for, at
    most END_WITHIN_S, and the process ends by EXIT_REQUEUE (Ctrl-C: KeyboardInterrupt). A second
    signal kills them.
    """
    programs = Programs(logs)
    queue: list[tuple[str, Future[int | None]]] = []

    def run(name: str, command: list[str]) -> int | None:
        code = programs.run(name, command)
        if code is not None:
            put(ended(name, code == 0))
        return code

    def put(commands: Iterable[Command]) -> None:
        queue.extend((name, pool.submit(run, name, command)) for name, command in commands)

    # `jobs` threads, each waits for a program; a signal reaches all programs
    with ThreadPoolExecutor(jobs) as pool, Interruption(signal.SIGINT) as interruption:
        put(commands)
        try:
            _follow(queue, programs, interruption)
        except BaseException:  # such as a terminal that is gone: the pool waits for what runs
            programs.end(signal.SIGINT)
            raise
    # how it ended: a second signal, failures, the first signal
    if interruption.insisted:
        raise SystemExit(128 + interruption.insisted)
    killed = {-signal.SIGKILL} if programs.killed else set[int]()
    fine = {0, None, *killed, *(_AS_ASKED if interruption.received else ())}
    failed = [name for name, each in queue if each.result() not in fine]
    # failures are named even if a signal came
    if failed and interruption.received:
        raise UserError(str(FailedError(failed, logs)))
    if failed:
        raise FailedError(failed, logs)
    if interruption.received == signal.SIGINT:
        raise KeyboardInterrupt
    if interruption.received:
        raise SystemExit(EXIT_REQUEUE)


def _follow(
    queue: Sequence[tuple[str, Future[int | None]]], programs: Programs, interruption: Interruption
) -> None:
    """Wait for all of a queue that may still grow, and pass on what comes in the meantime; raises
    what one of them raised.

    Programs are named in the queue's order, whichever thread began its own first.
    """
    limit = float("inf")
    # one that ends has put into the queue what follows it
    while left := [each for _, each in queue if not each.done()]:
        wait(left, _POLL_S, FIRST_EXCEPTION)
        for _, each in queue:
            if each.done():
                each.result()
        if interruption.received and not programs.ending:
            limit = time.monotonic() + END_WITHIN_S
            asked = programs.end(signal.SIGTERM)
            named = ", ".join(name for name, _ in queue if name in asked) or "none"
            said = f"sweep: {interruption.received.name}: {named} asked to"
            print(
                f"{said} end, and waited for {END_WITHIN_S:g} s; a second signal kills",
                file=sys.stderr,
                flush=True,
            )
        if interruption.insisted or time.monotonic() > limit:
            programs.end(signal.SIGKILL)


class Programs:
    """Commands as processes, each followed by the thread that runs it; their output goes to `logs`
    and the terminal.
    """

    def __init__(self, logs: Path) -> None:
        self.ending = self.killed = False
        self._logs = logs
        self._running = dict[str, "subprocess.Popen[str]"]()
        self._lock = threading.Lock()

    def end(self, number: signal.Signals) -> set[str]:
        """Send a signal to those that run, whose names it returns, and let no other begin."""
        with self._lock:
            self.ending = True
            self.killed = number == signal.SIGKILL
            # found first: one may end of the signal before it could be named
            runs = {name for name, process in self._running.items() if process.poll() is None}
            for name in runs:
                self._running[name].send_signal(number)  # does nothing if it has ended since
            return runs

    def run(self, name: str, command: list[str]) -> int | None:
        """One command, with its name before each line of output: its exit code, None if it was not
        begun.
        """
        with writing(self._logs):
            self._logs.mkdir(parents=True, exist_ok=True)
        with open(self._logs / f"{name.replace(' ', '-')}.txt", "w", encoding="utf-8") as log:
            process = self._begun(name, command)
            if process is None:
                return None
            with process:
                assert process.stdout is not None
                for line in process.stdout:
                    log.write(line)
                    log.flush()
                    print(f"{name:>14} | {line}", end="", flush=True)
        return process.returncode

    def _begun(self, name: str, command: list[str]) -> subprocess.Popen[str] | None:
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        environment = os.environ | threads | {LAUNCHER: str(os.getpid())}
        with self._lock:
            if self.ending:
                return None
            self._running[name] = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",  # a library's bytes that are no text end no sweep
                env=environment,
                process_group=0,
            )
            return self._running[name]
