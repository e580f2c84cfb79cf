"""Ends a process with the one that launched it: torchrun's ranks with torchrun, a sweep's programs
with the sweep.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

import psutil

# the id of the process that started this one to be ended with it
LAUNCHER = "MEGATRON_EFR_LAUNCHER"
_PR_SET_PDEATHSIG = 1


def is_rank() -> bool:
    """True in a process that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent has ended, if torchrun or LAUNCHER started
    it (Linux).

    torchrun leaves its ranks behind when it is killed; they would work on, and keep the run folder
    and the GPUs. A process whose launcher ended while it was starting is another's child by now,
    and ends at once.
    """
    parent = os.getppid()
    launcher = os.environ.get(LAUNCHER)
    if sys.platform == "linux" and (is_rank() or launcher == str(parent)):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
    if launcher is not None and not _lives(int(launcher)):
        os.kill(os.getpid(), signal.SIGKILL)


def _lives(process: int) -> bool:
    """True unless the process has ended, whether or not anybody has asked for its exit code."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
