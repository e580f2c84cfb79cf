"""Loops over a CPU's tensors, compiled by Numba: one pass over memory where torch's operations, one
after another, make several.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch


def loops_for(*tensors: torch.Tensor) -> ModuleType | None:
    """The module `loops`, if these are tensors that it takes: a CPU's, in float32 or bfloat16, of a
    process that gives torch one thread, as each loop has one. None without Numba.
    """
    taken = torch.get_num_threads() == 1 and all(
        t.device.type == "cpu" and t.dtype in (torch.float32, torch.bfloat16) for t in tensors
    )
    return _loops() if taken else None


@functools.cache
def _loops() -> ModuleType | None:
    """Numba is imported here and nowhere before: a process that computes on a GPU needs none."""
    try:
        _take_wide_vectors()
        return importlib.import_module("megatron_efr.compiled.loops")
    except ImportError:
        return None


def _take_wide_vectors() -> None:
    """Have Numba compile for vectors of 512 bits on a processor with AMX, unless its user chose
    features: LLVM prefers 256, because the first that had 512 slowed down when they were used.
    """
    config: Any = importlib.import_module("numba.core.config")
    features = importlib.import_module("numba.core.codegen").get_host_cpu_features()
    if config.CPU_FEATURES is None and "+amx-tile" in features:
        config.CPU_FEATURES = f"{features},-prefer-256-bit"
