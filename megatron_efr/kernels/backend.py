"""Choice of the row kernels' implementation: Triton's, or plain torch."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Literal, cast

import torch

from megatron_efr.config import ConfigError
from megatron_efr.kernels.row_kernels import RowKernels

Backend = Literal["triton", "torch"]


def choose_backend(kernels: Literal["auto", "triton", "torch"]) -> tuple[Backend, str]:
    """The implementation behind `model.kernels`, and why it was taken, for the log.

    `auto` takes Triton if CUDA is present and Triton imports. ConfigError if `triton` is asked for
    and cannot run; Triton's interpreter (TRITON_INTERPRET=1) counts as able, on any device.
    """
    if kernels == "torch":
        return "torch", "as configured"
    missing = _missing()
    if missing is None:
        return "triton", "as configured" if kernels == "triton" else (
            "auto: CUDA is present and triton imports"
        )
    if kernels == "triton":
        raise ConfigError(f"model.kernels: triton is asked for, and {missing}; use auto or torch")
    return "torch", f"auto: {missing}"


def row_kernels(backend: Backend) -> RowKernels:
    """The module of that implementation. Triton is imported here and nowhere before."""
    name = "triton_rows" if backend == "triton" else "torch_rows"
    module: ModuleType = importlib.import_module(f"megatron_efr.kernels.{name}")
    return cast(RowKernels, module)


def _missing() -> str | None:
    """Name what Triton kernels lack on this machine; None if they can run."""
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no CUDA device"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton does not import ({error})"
    return None
