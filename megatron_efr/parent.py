"""Ends a process with the one that launched it: torchrun's ranks with torchrun, a sweep's programs with the sweep."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

LAUNCHER = "MEGATRON_EFR_LAUNCHER"  # the id of the process that started this one to be ended with it
_PR_SET_PDEATHSIG = 1


def is_rank() -> bool:
    """True in a process that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent has ended, where torchrun or LAUNCHER started it (Linux).

    torchrun leaves its ranks behind when it is killed; they would work on, and keep the run folder and the GPUs. A rank
    that misses its parent's end while it starts cannot join the others: the parent kept their meeting place.
    """
    parent = os.getppid()
    if sys.platform == "linux" and (is_rank() or os.environ.get(LAUNCHER) == str(parent)):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
