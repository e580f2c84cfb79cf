"""The machine: GPUs and driver, NCCL, Triton's compiler, threads, ports, disk, shared memory."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.cuda import nccl

from megatron_efr.cluster.commands import NCCL_OF_SGLANG
from megatron_efr.doctor.finding import Finding, missing

# NCCL and torch keep a few hundred MB there; Docker's default of 64 MB ends in bus errors
SHM_GIB = 1.0


def check_gpus(needed: bool) -> Iterator[Finding]:
    """Driver, GPUs and NCCL, or what runs without them."""
    # what runs without one is more than people think
    if not torch.cuda.is_available():
        build = (
            f"torch is built for CUDA {torch.version.cuda}"
            if torch.version.cuda
            else "torch is a CPU build"
        )
        runs = (
            "runs here: all programs, of models that this machine's memory holds, on gloo; not: "
            "Triton kernels (but for its interpreter), Transformer Engine, NCCL, CUDA IPC"
        )
        yield missing("GPU", f"none that torch sees ({build})", runs, needed)
        return
    # the smallest GPU bounds the run: every rank holds as much as the others
    smallest = (
        min(
            torch.cuda.get_device_properties(i).total_memory
            for i in range(torch.cuda.device_count())
        )
        / 2**30
    )
    name = torch.cuda.get_device_name(0)
    count = torch.cuda.device_count()
    seen = (
        f"{count} x {name}, {smallest:.0f} GiB, driver {driver() or 'unknown'}, CUDA "
        f"{torch.version.cuda}"
    )
    yield Finding("GPU", "ok", seen)
    # Ampere was the first to multiply bfloat16 in hardware
    if torch.cuda.get_device_capability(0) < (8, 0):
        yield missing(
            "bfloat16",
            f"{name} computes it in software",
            "a GPU of compute capability 8.0 or newer",
            needed,
        )
    # ranks on several GPUs reduce their gradients by NCCL
    if dist.is_nccl_available():
        yield Finding("NCCL", "ok", ".".join(map(str, nccl.version())))
    else:
        yield missing(
            "NCCL",
            "torch is built without it",
            "a CUDA build of torch: bash launch/setup.sh",
            count > 1,
        )


def driver() -> str | None:
    """The NVIDIA driver's version."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def check_triton(needed: bool) -> Finding:
    """Compile a small kernel for this GPU, or for an H100 if there is none."""
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from megatron_efr.doctor.probe import add_one
    except ImportError as error:
        return missing(
            "Triton compiles", f"does not import: {error}", "bash launch/setup.sh", needed
        )
    major, minor = torch.cuda.get_device_capability(0) if torch.cuda.is_available() else (9, 0)
    source = ASTSource(add_one, signature={"x": "*fp32", "n": "i32"})
    try:
        triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, 32))
    except Exception as error:  # a compiler's errors are of many kinds, and each is the finding
        advice = (
            "its cache (TRITON_CACHE_DIR, default ~/.triton) must be writable; else bash "
            "launch/setup.sh"
        )
        return missing("Triton compiles", f"{type(error).__name__}: {error}", advice, needed)
    return Finding("Triton compiles", "ok", f"for compute capability {major}.{minor}")


def check_threads(environment: Mapping[str, str], cores: int) -> Finding:
    """OMP_NUM_THREADS: each rank takes as many threads as it says, or as there are cores."""
    value = environment.get("OMP_NUM_THREADS")
    if value is None:
        advice = (
            "export OMP_NUM_THREADS=1 where ranks compute on CPU: each would take all cores "
            "(torchrun sets 1)"
        )
        return Finding("threads", "note", f"OMP_NUM_THREADS is not set, {cores} cores", advice)
    if not value.isdigit() or not 0 < int(value) <= cores:
        return Finding(
            "threads",
            "note",
            f"OMP_NUM_THREADS={value} on {cores} cores",
            "a number from 1 to the cores",
        )
    return Finding("threads", "ok", f"OMP_NUM_THREADS={value}, {cores} cores")


def check_nccl_settings(environment: Mapping[str, str]) -> Finding:
    """Check that trainer and SGLang agree on NCCL if weights go over it: `megatron_efr.cluster`
    sees to it.
    """
    unset = {name: value for name, value in NCCL_OF_SGLANG.items() if name not in environment}
    if not unset:
        return Finding(
            "NCCL settings",
            "ok",
            " ".join(f"{name}={environment[name]}" for name in NCCL_OF_SGLANG),
        )
    seen = (
        f"{' and '.join(unset)} not set; SGLang sets 0 for itself, and one group wants the same "
        "of all"
    )
    exports = " ".join(f"{name}={value}" for name, value in unset.items())
    return Finding(
        "NCCL settings",
        "note",
        seen,
        f"launch/*.sh set them; before a plain torchrun: export {exports}",
    )


def check_port(port: int, what: str, host: str = "") -> Finding:
    """Check that `port` is free on this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one in TIME_WAIT is free
        try:
            probe.bind((host, port))
        except OSError as error:
            advice = f"end what listens there (ss -ltnp 'sport = :{port}'), or choose another port"
            return Finding(f"port {port}", "problem", f"{what}: {error.strerror}", advice)
    return Finding(f"port {port}", "ok", f"free, for {what}")


def check_disk(folder: Path, needed_bytes: int, what: str) -> Finding:
    """Check that the file system of `folder` (which need not be there yet) has room."""
    there = next(
        place for place in (folder.absolute(), *folder.absolute().parents) if place.exists()
    )
    free = shutil.disk_usage(there).free
    seen = f"{free / 2**30:.1f} GiB free at {there}, {needed_bytes / 2**30:.1f} GiB for {what}"
    if not os.access(there, os.W_OK):
        return Finding(
            "disk", "problem", f"{there} is not writable", "set runs=FOLDER to a place that is"
        )
    if free < needed_bytes:
        return Finding(
            "disk",
            "problem",
            seen,
            "make room, set runs=FOLDER elsewhere, or lower checkpoint.keep",
        )
    return Finding("disk", "ok", seen)


def check_shared_memory(needed: bool, path: Path = Path("/dev/shm")) -> Finding:
    """/dev/shm, through which processes of one machine exchange tensors."""
    if not path.is_dir():
        return Finding(
            "shared memory",
            "note",
            f"no {path}",
            "NCCL and data loaders need it: mount a tmpfs there",
        )
    size = shutil.disk_usage(path).total / 2**30
    if size < SHM_GIB:
        advice = "docker run --ipc=host, or --shm-size 16g"
        return missing(
            "shared memory", f"{path} has {size:.2f} GiB; {SHM_GIB:g} are wanted", advice, needed
        )
    return Finding("shared memory", "ok", f"{path}: {size:.1f} GiB")
