"""A publication's calls to SGLang's servers: the `Engines` of `publication.publisher`.

Every call goes to the servers that take part in the update that is going on (`health.Membership`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from megatron_efr import log
from megatron_efr.config import TimeoutsConfig
from megatron_efr.errors import EngineError
from megatron_efr.rollout.servers.process import ServerProcess
from megatron_efr.rollout.sglang.event_loop import EventLoopThread
from megatron_efr.rollout.sglang.fleet import Fleet
from megatron_efr.rollout.sglang.health import Membership
from megatron_efr.rollout.sglang.routed_fleet import RoutedFleet
from megatron_efr.rollout.sglang.server import Server, tensor_body
from megatron_efr.weights.architecture import Architecture

T = TypeVar("T")


class ServerUpdates:
    """The servers at `urls`, each of `engine_ranks` tensor-parallel ranks, spoken to from one
    background thread.

    Given `router`, its process and how often it is started again, it places the prompts.
    """

    def __init__(
        self,
        urls: Sequence[str],
        limits: TimeoutsConfig,
        key: str | None,
        engine_ranks: int,
        mixture: Architecture | None,
        router: tuple[ServerProcess, int] | None = None,
    ) -> None:
        async def make() -> Fleet:  # in the loop that its connections belong to
            return (
                RoutedFleet(urls, key, limits, *router)
                if router
                else Fleet(urls, key, limits, mixture)
            )

        self.engine_ranks = engine_ranks
        self._version = -1
        self._asleep = False
        self._paused_by: int | None = None
        self._updated_by: int | None = None  # the thread that is in the middle of an update
        self._thread = EventLoopThread("sglang")
        self._fleet = self._thread.run(make())

    @property
    def version(self) -> int:
        """Version of the weights being served; -1 before the first publication."""
        return self._version

    @property
    def urls(self) -> list[str]:
        """The addresses of the servers that take part."""
        return [server.url for server in self._membership.members]

    @property
    def count(self) -> int:
        """Number of servers that take part."""
        return len(self._membership.members)

    @property
    def taking_part(self) -> list[bool]:
        """Of all servers, whether each takes part."""
        return [server in self._membership.members for server in self._fleet.servers]

    @property
    def changed(self) -> bool:
        """True if other servers take part than in the last update, or one that was lost since."""
        return self._membership.changed

    def begin_update(self) -> None:
        """Decide which servers take part; pause them (unfinished responses are kept), drop what is
        cached, open the update session. Waits if no server answers.
        """
        if self._asleep:
            raise RuntimeError("the engine is asleep: wake() it before publish()")
        self._version = -1
        self._updated_by = threading.get_ident()
        self._thread.run(self._membership.begin())

    def update_from_tensor(self, payloads: list[str], load_format: str | None) -> None:
        """Send one bucket: a base64 payload for each tensor-parallel rank, the same to every
        server; or, if there are as many as all servers have ranks together, those that take no part
        included, each server its own.
        """
        ranks = self.engine_ranks
        bodies = [
            tensor_body(payloads[i : i + ranks], load_format)
            for i in range(0, len(payloads), ranks)
        ]
        servers = self._fleet.servers
        if len(bodies) not in (1, len(servers)):
            raise ValueError(
                f"{len(payloads)} payloads for {len(servers)} servers of {ranks} ranks"
            )
        own = dict(zip(servers, bodies * (len(servers) if len(bodies) == 1 else 1), strict=True))
        self._all(lambda server: server.update_from_tensor(own[server]))

    def join_group(self, address: str, port: int, name: str, backend: str) -> Future[None]:
        """Have every server enter a process group in which the trainer is rank 0; returns at
        once.
        """
        world = 1 + self.count * self.engine_ranks
        offsets = {
            server: 1 + i * self.engine_ranks for i, server in enumerate(self._membership.members)
        }
        body = {
            "master_address": address,
            "master_port": port,
            "world_size": world,
            "group_name": name,
        }
        return self._start(
            lambda server: server.join_group(
                body | {"backend": backend, "rank_offset": offsets[server]}
            )
        )

    def update_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group: str,
        load_format: str | None,
    ) -> Future[None]:
        """Have every server receive tensors that rank 0 of `group` broadcasts in this order;
        returns at once.
        """
        body = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group,
            "load_format": load_format,
            "flush_cache": False,
        }
        return self._start(lambda server: server.update_from_distributed(body))

    def leave_group(self, name: str) -> Future[None]:
        """Have every server that is in the process group leave it; returns at once."""

        async def leave(server: Server) -> None:
            try:
                await server.leave_group(name)
            # it has restarted since, and never was in the group, or is gone
            except EngineError as error:
                log.info(f"weights group {name}: {error}")

        async def work() -> None:
            await self._membership.all_answering(leave)

        return self._thread.start(work())

    def take_failing(self) -> list[str]:
        """Addresses of servers that have failed twice in a row, and ought to be started again; each
        is told once.
        """

        async def take() -> list[str]:
            return [server.url for server in self._membership.take_failing()]

        return self._thread.run(take())

    def update_from_disk(self, path: str) -> None:
        """Have every server read a model folder."""
        whole = str(Path(path).absolute())  # a server may have another working directory
        self._all(lambda server: server.update_from_disk(whole))

    def end_update(self, version: int) -> None:
        """Close the session, drop what is cached, name the weights, go on unless paused, check the
        version.
        """
        self._all(Server.end_update)
        self._all(Server.flush)
        self._all(lambda server: server.set_version(version))
        if self._paused_by is None:
            self._all(Server.resume)
        for url, served in zip(self.urls, self._all(Server.version), strict=True):
            if served != str(version):
                raise EngineError(
                    f"{url}: serves version {served} after the publication of {version}"
                )
        self._thread.run(self._ended(version))
        self._version = version
        self._updated_by = None

    def checksums(self) -> list[dict[str, str]]:
        """Each server's checksums of its weights, by SGLang's own parameter names."""
        return self._all(Server.checksums)

    # -- within
    # ----------------------------------------------------------------------------------------------

    @property
    def _membership(self) -> Membership:
        return self._fleet.membership

    async def _ended(self, version: int) -> None:
        self._membership.end(version)

    def _all(self, call: Callable[[Server], Coroutine[Any, Any, T]]) -> list[T]:
        return self._thread.run(self._membership.all_members(call))

    def _answering(self, call: Callable[[Server], Coroutine[Any, Any, T]]) -> list[T]:
        return self._thread.run(self._membership.all_answering(call))

    def _start(self, call: Callable[[Server], Coroutine[Any, Any, Any]]) -> Future[None]:
        async def work() -> None:
            await self._membership.all_members(call, together=True)

        return self._thread.start(work())
