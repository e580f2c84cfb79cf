"""Placement of ranks and engines on GPUs: a function of hosts and configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_efr.config import ConfigError, RolloutConfig
from megatron_efr.rollout.servers.host import Gpus, Host, neighbours

ENGINE_PORT = 30000
"""The first engine's port on a host without ranks; the next engines of the host take the ports
after it.
"""

RENDEZVOUS_PORT = 29500


@dataclass(frozen=True, slots=True)
class Rank:
    """One process of the trainer."""

    rank: int
    local_rank: int
    host: str
    gpu: int


@dataclass(frozen=True, slots=True)
class EngineGpus:
    """One SGLang server on GPUs of one host, at `port`; None if the run itself starts it and takes
    a free one.
    """

    index: int
    host: str
    gpus: Gpus
    port: int | None

    @property
    def url(self) -> str | None:
        return None if self.port is None else f"http://{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Placement:
    """Everything that runs where. `trainer_gpus` are those of each trainer host, the same on all of
    them.

    `apart`: weights go to engines on other GPUs, over NCCL.
    """

    trainer_hosts: tuple[str, ...]
    trainer_gpus: Gpus
    engines: tuple[EngineGpus, ...]
    rendezvous: str
    apart: bool = False

    @property
    def hosts(self) -> tuple[str, ...]:
        """All hosts, the trainer's first."""
        return tuple(
            dict.fromkeys([*self.trainer_hosts, *(engine.host for engine in self.engines)])
        )

    @property
    def ranks(self) -> list[Rank]:
        """The trainer's processes: torchrun numbers them host by host, hosts by name, GPUs in
        order.
        """
        seats = [
            (host, local, gpu)
            for host in self.trainer_hosts
            for local, gpu in enumerate(self.trainer_gpus)
        ]
        return [Rank(number, local, host, gpu) for number, (host, local, gpu) in enumerate(seats)]

    @property
    def urls(self) -> list[str]:
        """The engines that the run does not start itself."""
        return [engine.url for engine in self.engines if engine.url is not None]

    def engines_on(self, host: str) -> list[EngineGpus]:
        return [engine for engine in self.engines if engine.host == host]


def place(
    hosts: Sequence[str], gpus: int, rollout: RolloutConfig, port: int = RENDEZVOUS_PORT
) -> Placement:
    """Place a run on `hosts` of `gpus` GPUs each; ConfigError if it does not divide.

    colocated: ranks and engines on every GPU, an engine over `rollout.tp` neighbouring ones. apart:
    the last hosts, or on a single host its last GPUs, belong to the engines. Hosts are sorted by
    name, since torchrun's c10d does so.
    """
    hosts = sorted(hosts)
    whole, some = _apart(len(hosts), gpus, rollout)
    trainers, ranks = tuple(hosts[: len(hosts) - whole]), tuple(range(gpus - some))
    rendezvous = f"{hosts[0]}:{port}"
    apart = not rollout.embedded and rollout.placement == "apart"
    if whole:
        return Placement(
            trainers, ranks, place_engines(hosts[-whole:], gpus, rollout).engines, rendezvous, apart
        )
    seats = Host(count=len(hosts), ranks=len(ranks)).engine_gpus(rollout)
    beside = [(host, seat) for host in hosts for seat in seats]
    engines = tuple(
        EngineGpus(index, host, seat, None) for index, (host, seat) in enumerate(beside)
    )
    return Placement(trainers, ranks, engines, rendezvous, apart)


def place_engines(hosts: Sequence[str], gpus: int, rollout: RolloutConfig) -> Placement:
    """Engines alone, on every GPU of `hosts`."""
    if gpus % rollout.tp:
        fitting = [n for n in range(1, gpus + 1) if gpus % n == 0]
        raise ConfigError(
            f"rollout.tp: {rollout.tp} does not divide the {gpus} GPUs of a host; one of "
            f"{fitting} would"
        )
    seats = list(enumerate(neighbours(range(gpus), rollout.tp)))
    made = [(host, seat, ENGINE_PORT + number) for host in hosts for number, seat in seats]
    return Placement(
        (), (), tuple(EngineGpus(index, *where) for index, where in enumerate(made)), ""
    )


def _apart(hosts: int, gpus: int, rollout: RolloutConfig) -> tuple[int, int]:
    """Number of whole hosts that engines apart take, or of GPUs of a single one."""
    if rollout.embedded or rollout.urls or rollout.placement == "colocated":
        return 0, 0
    engines = rollout.engines or 1
    wanted = engines * rollout.tp
    product = f"{engines} engines x rollout.tp {rollout.tp} = {wanted}"
    if hosts == 1:
        if wanted >= gpus:
            raise ConfigError(
                f"rollout.engines: {product} GPUs leave none of {gpus} for the trainer"
            )
        return 0, wanted
    count, rest = divmod(wanted, gpus)
    if rest or count >= hosts:
        fitting = [n * gpus // rollout.tp for n in range(1, hosts)]
        raise ConfigError(
            f"rollout.engines: {product} GPUs are not whole hosts of {gpus} that leave one of "
            f"{hosts} for the trainer; one of {fitting} would fit"
        )
    return count, 0
