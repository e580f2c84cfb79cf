"""Which rank runs on which GPU, and which GPUs each engine takes: a function of hosts and configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_efr.config import ConfigError, RolloutConfig

ENGINE_PORT = 30000
"""The first engine's port on each host; the next engines of the host take the ports after it."""

RENDEZVOUS_PORT = 29500


@dataclass(frozen=True, slots=True)
class Rank:
    """One process of the trainer."""

    rank: int
    local_rank: int
    host: str
    gpu: int


@dataclass(frozen=True, slots=True)
class EngineSeat:
    """One SGLang server, on GPUs of one host."""

    index: int
    host: str
    gpus: tuple[int, ...]
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Placement:
    """Everything that runs where. `trainer_gpus` are those of each trainer host, the same on all of them."""

    trainer_hosts: tuple[str, ...]
    trainer_gpus: tuple[int, ...]
    engines: tuple[EngineSeat, ...]
    rendezvous: str

    @property
    def hosts(self) -> tuple[str, ...]:
        """All hosts, the trainer's first."""
        return tuple(dict.fromkeys([*self.trainer_hosts, *(engine.host for engine in self.engines)]))

    @property
    def ranks(self) -> list[Rank]:
        """The trainer's processes: torchrun numbers them host by host, hosts by name, GPUs in order."""
        seats = [(host, local, gpu) for host in self.trainer_hosts for local, gpu in enumerate(self.trainer_gpus)]
        return [Rank(number, local, host, gpu) for number, (host, local, gpu) in enumerate(seats)]

    def engines_on(self, host: str) -> list[EngineSeat]:
        return [engine for engine in self.engines if engine.host == host]


def place(hosts: Sequence[str], gpus: int, rollout: RolloutConfig, port: int = RENDEZVOUS_PORT) -> Placement:
    """Place a run on `hosts` of `gpus` GPUs each; ConfigError where it does not divide.

    colocated: ranks and engines on every GPU, an engine over `rollout.tp` neighbouring ones. apart: the last hosts, or
    on a single host its last GPUs, belong to the engines. Hosts are sorted by name, since torchrun's c10d does so.
    """
    hosts = sorted(hosts)
    everywhere = tuple(range(gpus))
    if rollout.engine == "local" or rollout.urls:
        return Placement(tuple(hosts), everywhere, (), f"{hosts[0]}:{port}")
    if gpus % rollout.tp:
        fitting = [n for n in range(1, gpus + 1) if gpus % n == 0]
        raise ConfigError(f"rollout.tp: {rollout.tp} does not divide the {gpus} GPUs of a host; one of {fitting} would")
    if rollout.placement == "colocated":
        engines = _engines([(host, everywhere) for host in hosts], rollout.tp)
        return Placement(tuple(hosts), everywhere, engines, f"{hosts[0]}:{port}")
    wanted = rollout.engines * rollout.tp
    if len(hosts) == 1:
        if wanted >= gpus:
            raise ConfigError(f"rollout.engines: {_product(rollout)} GPUs leave none of {gpus} for the trainer")
        engines = _engines([(hosts[0], everywhere[-wanted:])], rollout.tp)
        return Placement(tuple(hosts), everywhere[:-wanted], engines, f"{hosts[0]}:{port}")
    count, rest = divmod(wanted, gpus)
    if rest or count >= len(hosts):
        fitting = [n * gpus // rollout.tp for n in range(1, len(hosts))]
        raise ConfigError(
            f"rollout.engines: {_product(rollout)} GPUs are not whole hosts of {gpus} that leave one of {len(hosts)} "
            f"for the trainer; one of {fitting} would fit"
        )
    engines = _engines([(host, everywhere) for host in hosts[-count:]], rollout.tp)
    return Placement(tuple(hosts[:-count]), everywhere, engines, f"{hosts[0]}:{port}")


def _engines(seats: Sequence[tuple[str, tuple[int, ...]]], tp: int) -> tuple[EngineSeat, ...]:
    """Engines over every `tp` neighbouring GPUs of each (host, GPUs)."""
    made: list[EngineSeat] = []
    for host, gpus in seats:
        for place, start in enumerate(range(0, len(gpus), tp)):
            made.append(EngineSeat(len(made), host, gpus[start : start + tp], ENGINE_PORT + place))
    return tuple(made)


def _product(rollout: RolloutConfig) -> str:
    return f"{rollout.engines} engines x rollout.tp {rollout.tp} = {rollout.engines * rollout.tp}"
