"""The commands of each host of a placement: command lines and the environment that differs from the
host's own.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_efr.cluster.placement import EngineGpus, Placement

TRAINER_ENVIRONMENT = {
    # Megatron's tensor parallelism overlaps in the order of launching only so
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

NCCL_OF_SGLANG = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
"""Settings that SGLang (0.5.23, `_set_envs_and_config`) makes for itself if they are not set: NCCL
wants all ranks of a group to agree on them, and otherwise fails with "invalid argument", or hangs.
"""

UNSET = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Taken out of the trainer's environment: memory in expandable segments cannot be shared by CUDA
IPC.
"""


@dataclass(frozen=True, slots=True)
class Command:
    """One process of a host. `environment` replaces what the host has set, `defaults` only what it
    has not.
    """

    host: str
    what: str
    words: tuple[str, ...]
    environment: Mapping[str, str]
    defaults: Mapping[str, str] = field(default_factory=dict)

    def within(self, outer: Mapping[str, str]) -> dict[str, str]:
        """Its whole environment on a host that has `outer`."""
        kept = {name: value for name, value in outer.items() if name not in UNSET}
        return {**self.defaults, **kept, **self.environment}

    def __str__(self) -> str:
        settings = " ".join(
            f"{name}={shlex.quote(value)}" for name, value in self.within({}).items()
        )
        return f"{settings} {shlex.join(self.words)}".strip()


def trainer(
    placement: Placement, host: str, config: str, overrides: Sequence[str], run: str
) -> Command:
    """torchrun on one host: its ranks meet those of the other hosts at the rendezvous. Resumes what
    is there.

    Its first rank starts the engines of the host, whose GPUs it must therefore see; others are
    given as addresses.
    """
    urls = [f"rollout.urls=[{','.join(placement.urls)}]"] if placement.urls else []
    words = [
        *(sys.executable, "-m", "megatron_efr.torchrun"),
        *(
            "--nnodes",
            str(len(placement.trainer_hosts)),
            "--nproc-per-node",
            str(len(placement.trainer_gpus)),
        ),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", placement.rendezvous, "--rdzv-id", run),
        *("--local-addr", host),  # by which torchrun sorts hosts, and ranks with them
        *("-m", "megatron_efr.train", config, *overrides, *urls, "--resume"),
    ]
    return Command(
        host,
        "trainer",
        tuple(words),
        TRAINER_ENVIRONMENT,
        NCCL_OF_SGLANG if placement.apart else {},
    )


def engine(seat: EngineGpus, config: str, overrides: Sequence[str]) -> Command:
    """One engine, with its GPUs alone in sight. Its key comes in SGLANG_API_KEY, and not on the
    command line.
    """
    words = [
        *(sys.executable, "-m", "megatron_efr.cluster.serve", config, *overrides),
        *("--host", seat.host, "--port", str(seat.port), "--index", str(seat.index)),
    ]
    return Command(
        seat.host,
        f"engine {seat.index}",
        tuple(words),
        {"CUDA_VISIBLE_DEVICES": _listed(seat.gpus)},
    )


def over(interface: str) -> dict[str, str]:
    """The defaults that have gloo and NCCL meet the other hosts over a network interface."""
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}


def commands(
    placement: Placement, config: str, overrides: Sequence[str], run: str
) -> Iterator[Command]:
    """The programs of every host: torchrun if it has ranks, else one process for each engine."""
    for host in placement.hosts:
        if host in placement.trainer_hosts:
            yield trainer(placement, host, config, overrides, run)
        else:
            yield from (engine(seat, config, overrides) for seat in placement.engines_on(host))


def describe(placement: Placement) -> Iterator[str]:
    """The placement in lines: each host's ranks and engines by GPU."""
    for host in placement.hosts:
        ranks = [rank for rank in placement.ranks if rank.host == host]
        if ranks:
            yield (
                f"{host}: ranks {ranks[0].rank}-{ranks[-1].rank} on GPUs "
                f"{_listed([rank.gpu for rank in ranks])}"
            )
        for seat in placement.engines_on(host):
            where = f"at {seat.url}" if seat.url else f"started by rank {ranks[0].rank}"
            yield f"{host}: engine {seat.index} on GPUs {_listed(seat.gpus)} {where}"


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
