"""Membership of servers: health checks, losses, and the members of a publication.

A server is `SERVING` the weights published last; `LOST`, when it did not answer or failed; or
`EMPTY`, when it answers but has not these weights: it has restarted, or was left out. Only a
publication makes a server serve: whatever became of one that was lost, it is paused, given all
weights, and only then gets responses.

Everything here runs in one asyncio loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from megatron_efr import log
from megatron_efr.config import TimeoutsConfig
from megatron_efr.errors import EngineError, LostError, NoEngineError
from megatron_efr.rollout.sglang.server import WEIGHTS, Server

T = TypeVar("T")

MISSES = 3
"""Health checks that fail in a row before a server is lost."""

FAILURES = 2
"""Publications that a server fails in a row before it ought to be started again."""


class State(Enum):
    SERVING = "serving"
    UPDATING = "updating"  # takes part in the publication that is going on
    LOST = "lost"
    EMPTY = "empty"


@dataclass(slots=True)
class Events:
    """Counts of what befell servers since they were last read."""

    lost: int = 0
    back: int = 0  # lost ones that a publication took in again


class Membership:
    """The state of every server, kept by a health check of each every `check_s` seconds but in
    publications.
    """

    def __init__(self, servers: Sequence[Server], limits: TimeoutsConfig) -> None:
        self.servers, self.members = list(servers), list(servers)
        self.events = Events()
        self.told = asyncio.Event()  # set when the serving servers change; who looks clears it
        # this publication's servers, or a start of one, are others than the last one's
        self.changed = True
        self._limits = limits
        self._state = dict.fromkeys(servers, State.EMPTY)
        self._version: str | None = None
        self._last: set[Server] = set()  # took part in the last publication
        self._same: set[Server] = set()  # and were not lost since
        self._failed: set[Server] = set()  # in the publication that is being begun again
        # since a publication that it took part in succeeded
        self._failures = dict.fromkeys(servers, 0)
        self._returning: set[Server] = set()
        self._losses = {server: asyncio.Event() for server in servers}
        self._updates = 0
        self._settled = asyncio.Event()
        self._settled.set()
        self._watches = [asyncio.create_task(self._watch(server)) for server in servers]

    def close(self) -> None:
        """End the health checks."""
        for watch in self._watches:
            watch.cancel()

    # -- responses
    # ----------------------------------------------------------------------------------------------

    @property
    def serving(self) -> list[Server]:
        return [server for server in self.servers if self._state[server] is State.SERVING]

    @property
    def empty(self) -> list[Server]:
        """The servers that answer, and serve once they are published to."""
        return [server for server in self.servers if self._state[server] is State.EMPTY]

    @property
    def serving_urls(self) -> set[str]:
        return {server.url for server in self.serving}

    @property
    def current_urls(self) -> set[str]:
        """Of servers that serve, or will at the end of the publication that is going on."""
        return {s.url for s in self.servers if self._state[s] in (State.SERVING, State.UPDATING)}

    async def settled_serving(self) -> list[Server]:
        """The servers that serve, after any publication that is going on; NoEngineError if there is
        none.
        """
        await self._settled.wait()
        if not self.serving:
            urls = ", ".join(server.url for server in self.servers)
            raise NoEngineError(
                f"none of {len(self.servers)} servers is left that serves version "
                f"{self._version}: {urls}"
            )
        return self.serving

    async def unless_lost(self, server: Server, work: Coroutine[Any, Any, T]) -> T:
        """Do `work`, which waits for `server`; LostError as soon as the server is lost, however
        long it could wait.
        """
        return await unless(self._losses[server], work, f"{server.url}: lost while it worked")

    async def examine(self, server: Server) -> None:
        """Find out whether a server that failed to give a response still serves."""
        await self._settled.wait()
        if self._state[server] is State.SERVING:
            began = self._updates
            try:
                version = await server.version()
            except EngineError as error:
                if began == self._updates:
                    self.lose(server, str(error))
            else:
                self._answered(server, version, began)

    def lose(self, server: Server, why: str) -> None:
        """`server` serves no more, until a publication takes it in again; what waits for it waits
        no longer.
        """
        if self._state[server] in (State.SERVING, State.UPDATING):
            self.events.lost += 1
            self._returning.add(server)
            log.event("lost", f"engine {server.url} is lost: {why}", logging.WARNING)
        self._state[server] = State.LOST
        self._same.discard(server)
        self._losses[server].set()
        self.told.set()

    # -- calls
    # ----------------------------------------------------------------------------------------------

    async def all_members(
        self, call: Callable[[Server], Coroutine[Any, Any, T]], together: bool = False
    ) -> list[T]:
        """Make `call` of all that take part, at once, and wait for all; those that fail are lost,
        and EngineError, or LostError if none refused, has the words of all of them. Calls that wait
        for each other on the servers' side, `together`, end with the first that fails.
        """
        answers, failed = await _each(self.members, call, together)
        for server, error in failed.items():
            self.lose(server, str(error))
            self._failures[server] += 1
        self._failed |= failed.keys()
        if failed:
            kind = (
                LostError
                if all(isinstance(error, LostError) for error in failed.values())
                else EngineError
            )
            raise kind("; ".join(map(str, failed.values()))) from next(iter(failed.values()))
        return list(answers.values())

    async def all_answering(self, call: Callable[[Server], Coroutine[Any, Any, T]]) -> list[T]:
        """Make `call` of all that were not lost; one that is lost now is left out, a refusal is an
        EngineError.
        """
        answers, failed = await _each(self._not_lost(), call)
        for server, error in failed.items():
            if not isinstance(error, LostError):
                raise error
            self.lose(server, str(error))
        return list(answers.values())

    async def look(self) -> None:
        """Find out which lost servers answer again."""
        await self._look(self.servers)

    # -- publication
    # ----------------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Decide who takes part, and open a session with each: all that answer, but, if there are
        others, those that failed in the publication that is begun again. EngineError if none has
        come back within `start_s`.
        """
        self._updates += 1
        self._settled.clear()
        await self._look(self._failed)
        self.members = await self._open_answering() or await self._open_returning()
        for server in self.members:
            self._state[server] = State.UPDATING
            self._losses[server].clear()
        left_out = [
            f"{s.url} ({self._state[s].value})" for s in self.servers if s not in self.members
        ]
        if left_out:
            log.warning(f"publishing to {len(self.members)} engines, without {', '.join(left_out)}")
        self.changed = not set(self.members) == self._last == self._same

    def end(self, version: int) -> None:
        """All members have the weights, and serve, but those of which a response was lost in the
        meantime.
        """
        self._version, self._failed, self._last = str(version), set(), set(self.members)
        self._same = {server for server in self.members if self._state[server] is State.UPDATING}
        for server in self._same:
            self._state[server] = State.SERVING
            self._failures[server] = 0
        for server in sorted(self._returning & self._same, key=lambda server: server.url):
            self.events.back += 1
            log.event("back", f"engine {server.url} serves again, with version {version}")
        self._returning -= self._same
        self._settled.set()
        self.told.set()

    def take_failing(self) -> list[Server]:
        """Servers that have failed `FAILURES` publications in a row, or their beginning; each is
        told once.
        """
        found = [server for server, failures in self._failures.items() if failures >= FAILURES]
        self._failures |= dict.fromkeys(found, 0)
        return found

    # -- within
    # ----------------------------------------------------------------------------------------------

    def _not_lost(self) -> list[Server]:
        return [server for server in self.servers if self._state[server] is not State.LOST]

    async def _open_answering(self) -> list[Server]:
        """The answering servers with which a session is open now; those that failed are lost."""
        answering = self._not_lost()
        trying = [server for server in answering if server not in self._failed] or answering
        opened, refused = await _each(trying, _open)
        for server, error in refused.items():
            self.lose(server, str(error))
            self._failures[server] += 1
        return list(opened)

    async def _open_returning(self) -> list[Server]:
        """Wait until at least one server has come back."""
        began = time.monotonic()
        limit = self._limits.start_s
        log.warning(
            f"no engine answers: waiting up to rollout.timeouts.start_s = {limit:g} s for one to "
            "come back"
        )
        while time.monotonic() - began < limit:
            await asyncio.sleep(min(self._limits.check_s, limit))
            await self._look(self.servers)
            if opened := await self._open_answering():
                return opened
        urls = ", ".join(server.url for server in self.servers)
        raise EngineError(
            f"no engine has come back within rollout.timeouts.start_s = {limit:g} s: {urls}"
        )

    async def _look(self, servers: Iterable[Server]) -> None:
        """Lost servers that answer are empty."""
        answers, _ = await _each([s for s in servers if self._state[s] is State.LOST], Server.check)
        for server, version in answers.items():
            self._back(server, version)

    def _back(self, server: Server, version: str) -> None:
        """A lost server answers. One that has restarted has all its memory: its weights have
        SGLang's name again.
        """
        self._state[server] = State.EMPTY
        if self._version is not None and not version.isdigit():
            server.released.clear()

    async def _watch(self, server: Server) -> None:
        missed = 0
        while True:
            await asyncio.sleep(self._limits.check_s)
            began = self._updates
            if not self._settled.is_set():
                missed = 0
                continue
            try:
                version = await server.check()
            except EngineError as error:
                missed += 1
                if missed >= MISSES and began == self._updates:
                    self.lose(server, f"{missed} health checks failed, the last one: {error}")
            else:
                missed = 0
                self._answered(server, version, began)

    def _answered(self, server: Server, version: str, began: int) -> None:
        """Judge an answer to a question that was asked after `began` updates."""
        if began != self._updates:
            return
        if self._state[server] is State.SERVING and version != self._version:
            self.lose(
                server, f"it has restarted, with weights {version!r} and not {self._version!r}"
            )
        if self._state[server] is State.LOST:
            self._back(server, version)
            log.info(f"engine {server.url} answers again, and serves from the next publication on")


async def unless(happens: asyncio.Event, work: Coroutine[Any, Any, T], said: str) -> T:
    """Do `work`; LostError with what is `said` as soon as `happens` is set."""
    working, happening = asyncio.ensure_future(work), asyncio.ensure_future(happens.wait())
    try:
        await asyncio.wait((working, happening), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise LostError(said)
    finally:
        working.cancel()
        happening.cancel()


async def _open(server: Server) -> None:
    """Pause (unfinished responses are kept), drop what is cached, open a session, if need be after
    closing one that a publication left open that failed, here or in a trainer that died. One that
    slept when others woke wakes here.
    """
    await server.check()
    await server.pause()
    await server.flush()
    await server.resume_memory(WEIGHTS)
    try:
        await server.begin_update()
    except LostError:
        raise
    except EngineError:
        await server.end_update()
        await server.begin_update()


async def _each(
    servers: Sequence[Server],
    call: Callable[[Server], Coroutine[Any, Any, T]],
    together: bool = False,
) -> tuple[dict[Server, T], dict[Server, EngineError]]:
    """Make `call` of all `servers` at once: what they answered, and how others failed."""
    calls = {server: asyncio.ensure_future(call(server)) for server in servers}
    answers: dict[Server, T] = {}
    failed: dict[Server, EngineError] = {}
    if not calls:
        return answers, failed
    try:
        until = asyncio.FIRST_EXCEPTION if together else asyncio.ALL_COMPLETED
        done, _ = await asyncio.wait(calls.values(), return_when=until)
    finally:
        for made in calls.values():
            made.cancel()
    for server, made in calls.items():
        if made not in done:
            continue
        if (error := made.exception()) is None:
            answers[server] = made.result()
        elif isinstance(error, EngineError):
            failed[server] = error
        else:
            raise error
    return answers, failed
