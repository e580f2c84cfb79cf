"""The SGLang servers of a run: every host's first rank starts those of its host, and every rank
learns of all.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_efr.addresses import KEY, LOOPBACK, address_towards, private_address
from megatron_efr.config import ConfigError, ModelConfig, RolloutConfig
from megatron_efr.errors import UserError
from megatron_efr.rollout.servers.host import Host
from megatron_efr.rollout.servers.launcher import Launcher
from megatron_efr.rollout.servers.watch import Watch
from megatron_efr.weights.architecture import Architecture


@dataclass(frozen=True)
class Servers:
    """The addresses of all servers of a run, in the order of the GPUs that they take, and their
    key.

    On a host's first rank `watch` starts the host's servers again if they end or hang.
    """

    urls: Sequence[str] = ()
    key: str | None = None
    watch: Watch | None = None

    def hold(self) -> None:
        """Put restarts off while the trainer has the GPUs to itself; every rank may call it."""
        if self.watch is not None:
            self.watch.hold()

    def restart(self, urls: Sequence[str]) -> None:
        """End those servers that this host has started; they are started again. Every rank may call
        it.
        """
        if self.watch is not None:
            self.watch.restart(urls)

    def allow(self) -> None:
        """Start what was put off by `hold`."""
        if self.watch is not None:
            self.watch.allow()


@contextmanager
def start_servers(
    model: ModelConfig,
    architecture: Architecture,
    rollout: RolloutConfig,
    folder: Path,
    seed: int,
    cpu_world: dist.ProcessGroup,
) -> Iterator[Servers]:
    """The servers that a run asks for, ready, and ended with the block; every rank enters it.

    Those in `rollout.urls` are somebody else's. The others write to `folder`, listen on this
    machine alone or, if there are several hosts, on the private network, and take random numbers
    from `seed` and those after it. UserError, on every rank, has the words of a host whose servers
    did not start.
    """
    # servers of somebody else's need nothing here
    host = Host.of_this_process()
    engine_gpus = host.engine_gpus(rollout)
    if not engine_gpus:
        yield Servers(rollout.urls, os.environ.get(KEY))
        return
    address = _address(host, cpu_world)
    key = _from_rank_0(secrets.token_hex(32), cpu_world)
    # a host's first rank starts the host's servers
    with ExitStack() as resources:
        urls: list[str] = []
        watch, failure = None, None
        if dist.get_rank(cpu_world) % host.ranks == 0:
            try:
                launcher = resources.enter_context(Launcher(folder, rollout.timeouts.stop_s, key))
                listen = private_address(address)
                urls = _start(launcher, model, architecture, rollout, seed, host, listen)
                watch = launcher.watch(rollout.timeouts, rollout.restarts)
            except Exception as error:  # the others must not wait for what will never come
                failure = error
        # all ranks learn all addresses, or who failed
        everyone: list[Any] = [None] * dist.get_world_size(cpu_world)
        dist.all_gather_object(
            everyone, (urls, failure and f"host {address}: {failure}"), group=cpu_world
        )
        if failure is not None:
            raise failure
        if failures := [said for _, said in everyone if said]:
            raise UserError("; ".join(failures))
        yield Servers([url for theirs, _ in everyone for url in theirs], key, watch)
        dist.barrier(cpu_world)  # rank 0 has let go of all servers before any host ends its own


def _start(
    launcher: Launcher,
    model: ModelConfig,
    architecture: Architecture,
    rollout: RolloutConfig,
    seed: int,
    host: Host,
    address: str,
) -> list[str]:
    """This host's servers, ready: their addresses."""
    on_gpu = torch.cuda.is_available()
    engine_gpus = host.engine_gpus(rollout)
    if on_gpu and engine_gpus[-1][-1] >= torch.cuda.device_count():
        raise ConfigError(
            f"rollout.engines: {len(engine_gpus)} engines x rollout.tp {rollout.tp} after "
            f"{host.ranks} ranks need GPUs up to number {engine_gpus[-1][-1]}, and "
            f"{torch.cuda.device_count()} are visible; start fewer ranks or engines"
        )
    shared = rollout.placement == "colocated"
    for place, gpus in enumerate(engine_gpus):
        index = host.number * len(engine_gpus) + place
        launcher.start_engine(
            model,
            architecture,
            rollout,
            index,
            seed=seed,
            on_gpu=on_gpu,
            first_gpu=gpus[0],
            shared=shared,
            host=address,
        )
    return launcher.wait(rollout.timeouts.start_s)


def _address(host: Host, cpu_world: dist.ProcessGroup) -> str:
    """The address of this host's servers: one host keeps to itself; of several, each the one by
    which it reaches rank 0's.

    Rank 0's host itself may know its name as 127.0.1.1, so it takes the last rank's word for its
    address.
    """
    if host.count == 1:
        return LOOPBACK
    known = [private_address(os.environ["MASTER_ADDR"]) if host.number == host.count - 1 else None]
    dist.broadcast_object_list(known, src=dist.get_world_size(cpu_world) - 1, group=cpu_world)
    assert known[0] is not None
    return address_towards(known[0])


def _from_rank_0(value: str, cpu_world: dist.ProcessGroup) -> str:
    shared = [value]
    dist.broadcast_object_list(shared, src=0, group=cpu_world)
    return shared[0]
