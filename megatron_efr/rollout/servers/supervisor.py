"""Runs one command, and ends it with all its descendants when it is told to or when the process it
works for is gone.

    python supervisor.py PID SECONDS COMMAND...
        ends with the command's exit code, 128 + n if signal n ended it

PID is the process worked for. SIGTERM gives the command SECONDS to end by itself; when PID is gone,
it gets none. A file of its own for the standard library alone: it starts in no time and has one
thread, so that a child may safely be prepared between fork and exec. If the supervisor itself is
killed, the kernel kills the command (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def supervise(pid: int, seconds: float, command: list[str]) -> int:
    """Run `command` until it ends, process `pid` is gone or SIGTERM comes; its exit code, nothing
    left of it.
    """
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of the command become our children, and are found
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    try:
        worked_for = os.pidfd_open(pid)
    except ProcessLookupError:
        return 0
    child = subprocess.Popen(command, preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
    ended = os.pidfd_open(child.pid)
    ready, _, _ = select.select([worked_for, told, ended], [], [])
    if told in ready and worked_for not in ready:
        child.terminate()
        select.select([ended, worked_for], [], [], seconds)
    child.kill()
    code = child.wait()
    _kill_descendants()
    return code


def _kill_descendants() -> None:
    """Kill until no child is left: what a child leaves behind becomes ours, and is killed in the
    next round.
    """
    while children := _children():
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
        for child in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, os.WNOHANG)


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


if __name__ == "__main__":
    ended_with = supervise(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
    sys.exit(ended_with if ended_with >= 0 else 128 - ended_with)
