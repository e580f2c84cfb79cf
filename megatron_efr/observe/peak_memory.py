"""Peak memory, phase by phase: this process's on the host and, with a GPU, its tensors' and what
all processes use.
"""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path
from typing import Any

GIB = 2**30
PROCESS = Path("/proc/self")


class Peaks:
    """The highest figures in each phase since they were last taken, and in all, in GiB. For one
    thread.

    Kinds: `memory_gib` (resident in host memory), `cuda_memory_gib` (tensors of this process),
    `device_gib` (used on this rank's GPU by every process as the phase ends, what allocators keep
    in reserve included). A kind that the machine does not tell is left out.
    """

    def __init__(self) -> None:
        self._open: list[str] = []
        self._by_phase: dict[str, float] = {}
        self._in_all: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        self._note()
        self._open.append(phase)

    def leave(self) -> None:
        self._note()
        self._open.pop()

    def take(self) -> dict[str, float]:
        """`<phase>_<kind>` since the last call, and `<kind>` since the process began."""
        self._note()
        taken = self._by_phase
        self._by_phase = {}
        # some kernels forget what `_note` resets
        whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return (
            taken | self._in_all | {"memory_gib": max(whole, self._in_all.get("memory_gib", 0.0))}
        )

    def _note(self) -> None:
        """Credit the peak since the last note to all open phases."""
        for kind, value in _since_last_time().items():
            self._in_all[kind] = max(value, self._in_all.get(kind, 0.0))
            for name in {f"{phase}_{kind}" for phase in self._open}:
                self._by_phase[name] = max(value, self._by_phase.get(name, 0.0))


def _since_last_time() -> dict[str, float]:
    """The peaks since the last call."""
    peaks = {}
    if (resident := _resident_peak()) is not None:
        peaks["memory_gib"] = resident
    torch: Any = sys.modules.get("torch")  # a process that never imported it has no tensors
    if torch is not None and torch.cuda.is_initialized():
        peaks["cuda_memory_gib"] = torch.cuda.max_memory_allocated() / GIB
        torch.cuda.reset_peak_memory_stats()
        free, total = torch.cuda.mem_get_info()
        peaks["device_gib"] = (total - free) / GIB
    return peaks


def _resident_peak() -> float | None:
    """Highest resident memory since the last call, in GiB; None if the kernel keeps or resets no
    such figure.
    """
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", (PROCESS / "status").read_text(encoding="ascii"))
        # proc(5): resets the peak to what is resident now
        (PROCESS / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    return int(found[1]) / 2**20 if found else None
