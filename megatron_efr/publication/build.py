"""Builds the publisher that a configuration asks for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist

from megatron_efr.addresses import own_address
from megatron_efr.config import ConfigError, RolloutConfig, TrainConfig
from megatron_efr.errors import UserError
from megatron_efr.publication.checksums import ChecksumCheck, Hashing
from megatron_efr.publication.publisher import Embedded, Engines, Publisher, Receiver, Transport
from megatron_efr.publication.sglang_layout import EngineLayout
from megatron_efr.publication.transports import Broadcast, Disk, Handles, InBand, Sliced
from megatron_efr.weights.architecture import Architecture


def build_publisher(
    config: TrainConfig,
    architecture: Architecture,
    engine: Receiver | Engines | None,
    cpu_world: dist.ProcessGroup,
    restart: Callable[[Sequence[str]], None],
) -> Embedded | Publisher:
    """For `engine`, which is rank 0's and None elsewhere; every rank of `cpu_world` calls it alike.

    `restart` is given the addresses of servers that have failed twice.
    """
    if config.rollout.embedded:
        return Embedded(cast(Receiver | None, engine))
    # how tensors travel
    layout = EngineLayout(architecture, config.rollout.tp)
    on_gpu = torch.cuda.is_available()
    transport = _transport(config, cast(Engines | None, engine), cpu_world, layout, on_gpu)
    dtype = getattr(torch, config.model.dtype)
    # how servers hash what arrived; layouts that they change cannot be compared
    hashing: Hashing | None = "fmix32" if on_gpu else "sha256"
    if config.rollout.server.get("ep_size", 1) > 1 or (layout.padded_on_cpu and not on_gpu):
        hashing = None
    return Publisher(
        transport,
        cast(Engines | None, engine),
        cpu_world,
        check=lambda: ChecksumCheck(layout, dtype, hashing),
        verify_every=config.rollout.verify_every,
        restart=restart,
    )


def _transport(
    config: TrainConfig,
    engines: Engines | None,
    cpu_world: dist.ProcessGroup,
    layout: EngineLayout,
    on_gpu: bool,
) -> Transport:
    rollout = config.rollout
    kind = transport_of(rollout, on_gpu)
    # by file, process group, or as the engine's own slices
    if kind == "disk":
        return Disk(engines, config.folder / "engines" / "weights", Path(config.model.path))
    if kind == "distributed":
        address = own_address(engines.urls[0]) if engines else ""
        return Broadcast(engines, address, "nccl" if on_gpu else "gloo", rollout.timeouts.update_s)
    # slices are cut here, so the server's split must be known to the row
    if kind == "direct":
        if layout.architecture.experts:
            raise ConfigError(
                "rollout.transport: direct sends dense models only; tensor sends a mixture of "
                "experts"
            )
        if not on_gpu and layout.padded_on_cpu:
            raise ConfigError(
                "rollout.transport: direct: on a CPU SGLang widens this model for rollout.tp = "
                f"{layout.ranks}, which does not divide its heads, or 32 times which its MLP; "
                "tensor leaves that to SGLang"
            )
        return Sliced(engines, layout)
    # else in or beside the request
    if on_gpu and rollout.placement == "apart":
        raise ConfigError(
            "rollout.transport: tensor hands over GPU memory where it lies: it needs engines that "
            "the run itself starts, with rollout.placement: colocated; distributed does not"
        )
    # beside the request on a CPU, as handles of GPU memory else
    if not on_gpu:
        return InBand(engines)
    check_allocator(os.environ)
    return Handles(engines, cpu_world)


def transport_of(rollout: RolloutConfig, on_gpu: bool) -> str:
    """`rollout.transport`, or what `auto` is: without a GPU there are no handles, and requests
    carry weights as text, which takes ten times as long as a broadcast over gloo.
    """
    if rollout.transport != "auto":
        return rollout.transport
    return "tensor" if on_gpu and rollout.placement == "colocated" else "distributed"


def check_allocator(environment: Mapping[str, str]) -> None:
    """UserError if torch's allocator makes memory that engines cannot open.

    An expandable segment is handed over as a file descriptor, which the engine may fetch from this
    process only if it may trace it: not under Linux's usual ptrace_scope, since this process is not
    the engine's child.
    """
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if (
            "expandable_segments:true"
            in (value := environment.get(name, "")).replace(" ", "").lower()
        ):
            raise UserError(
                f"{name}={value}: engines that share the trainer's GPUs cannot open memory in "
                f"expandable segments; unset {name}, or start through `python -m "
                "megatron_efr.cluster` or launch/*.sh, which do"
            )
