"""Several SGLang servers as one: whole groups from the least loaded of those that serve.

Everything here runs in one asyncio loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import aiohttp

from megatron_efr.config import TimeoutsConfig
from megatron_efr.errors import EngineError, LostError
from megatron_efr.rollout.codec import Codec
from megatron_efr.rollout.driver import Driver
from megatron_efr.rollout.sglang.health import Events, Membership
from megatron_efr.rollout.sglang.respond import respond
from megatron_efr.rollout.sglang.server import Answer, BrokenError, Server
from megatron_efr.types import Group, Request, Response, Sampling
from megatron_efr.weights.architecture import Architecture

SENDS = 3
"""Times that one response is asked for of servers that fail to give it, though they serve."""

REST_S = 30.0
"""Seconds that a server which lost a response is passed over, if there are others."""

IDLE_S = 3.0
"""Seconds that an unused connection is kept: SGLang's web server closes it after 5 s."""


@dataclass(slots=True)
class Tally:
    """Counts of what was done since they were last read."""

    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    resent: int = 0
    seconds: float = 0.0  # in which at least one response was being generated
    serving: int = 0  # servers, now
    empty: int = 0  # that a publication would have serve, now
    lost: int = 0
    back: int = 0


@dataclass(slots=True)
class Place:
    """The place at which one response is in work."""

    server: Server | None = None


class Fleet:
    """Servers that share one connection pool. Responses to a prompt come from one server, and share
    its cache.
    """

    def __init__(
        self,
        urls: Sequence[str],
        key: str | None,
        limits: TimeoutsConfig,
        mixture: Architecture | None = None,
    ) -> None:
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S)
        self._session = aiohttp.ClientSession(
            connector=connector, headers=headers, read_bufsize=2**20
        )
        self.servers = [Server(url, self._session, limits, mixture) for url in urls]
        self.membership = Membership(self.servers, limits)
        self._loads = dict.fromkeys(self.servers, 0)
        self._rests_until = dict.fromkeys(self.servers, 0.0)
        self._name = uuid.uuid4().hex[:12]
        self._numbers = itertools.count()
        self._tally = Tally()
        self._busy_since = 0.0

    async def close(self) -> None:
        """Close the connections."""
        self.membership.close()
        await self._session.close()

    async def group(self, request: Request, sampling: Sampling, codec: Codec) -> Group:
        """The whole group that answers `request`, from the server with the fewest responses in
        work.
        """
        server = await self._choose()
        # counted before the next group is placed
        places = [self._place(server) for _ in range(request.samples)]
        made = enumerate(request.scripts)
        drivers = [
            Driver(script.steps(sample), sampling, codec, request.prompt) for sample, script in made
        ]
        tasks = [
            asyncio.create_task(self._response(place, request, driver, sampling))
            for place, driver in zip(places, drivers, strict=True)
        ]
        try:
            responses = await asyncio.gather(*tasks)
        finally:
            for task, place in zip(tasks, places, strict=True):
                task.cancel()
                self._move(place, None)  # a task that is cancelled before it began does not
        return Group(request.prompt, tuple(responses), request.seed, request.scripts, request.note)

    async def _response(
        self, place: Place, request: Request, driver: Driver, sampling: Sampling
    ) -> Response:
        """One response, draw by draw, as its script has it."""
        try:
            ask = partial(self._counted, place, request.prompt.id)
            return await respond(driver, request.prompt.tokens, sampling, ask)
        finally:
            self._move(place, None)

    async def _counted(
        self, place: Place, name: str, tokens: tuple[int, ...], sampling: Sampling
    ) -> Response:
        answer = await self._draw(place, name, tokens, sampling)
        self._tally.tokens += answer.response.length
        self._tally.prompt_tokens += len(tokens)
        self._tally.cached_tokens += answer.cached_tokens
        return answer.response

    async def _draw(
        self, place: Place, name: str, tokens: tuple[int, ...], sampling: Sampling
    ) -> Answer:
        """One draw; one that was lost is asked for again, under a new name, of the server least
        loaded then.
        """
        sends = 0
        while True:
            server = await self._serving(place)
            rid = self._new_rid()
            try:
                return await self.membership.unless_lost(
                    server, server.generate(rid, tokens, sampling)
                )
            except LostError as error:
                await self._judge(server, error)
                sends += server in self.membership.serving
                if sends == SENDS:
                    raise EngineError(f"prompt {name}: lost {SENDS} times: {error}") from error
            self._tally.resent += 1
            if server in self.membership.serving:
                self._rests_until[server] = time.monotonic() + REST_S
                with contextlib.suppress(LostError):  # then the request is lost with the connection
                    await server.abort(rid)
                await asyncio.sleep(sends)
            self._move(place, await self._least_loaded())

    async def _serving(self, place: Place) -> Server:
        """The server that a response is in work at; another if it does not serve any more, once it
        is known who does.

        A draw that follows another may come while weights are published, or after its server was
        lost.
        """
        if place.server not in await self.membership.settled_serving():
            self._move(place, await self._least_loaded())
        assert place.server is not None
        return place.server

    async def _judge(self, server: Server, error: LostError) -> None:
        """Find out if a server that failed to give a response serves on."""
        if isinstance(error, BrokenError):
            self.membership.lose(server, str(error))
        else:
            await self.membership.examine(server)

    async def _choose(self) -> Server:
        """The server that a group is asked of first."""
        return await self._least_loaded()

    def _new_rid(self) -> str:
        """An id of the one length that all have: an abort takes every request whose id begins with
        the one given.
        """
        return f"{self._name}-{next(self._numbers):012d}"

    async def _least_loaded(self) -> Server:
        serving = await self.membership.settled_serving()
        now = time.monotonic()
        rested = [server for server in serving if self._rests_until[server] <= now]
        return min(rested or serving, key=self._loads.__getitem__)

    def _place(self, server: Server) -> Place:
        place = Place()
        self._move(place, server)
        return place

    def _move(self, place: Place, server: Server | None) -> None:
        """Count a response in work against `server` and no more against the one before, and the
        time in which there is any; None when it is over.
        """
        if server is not None:
            if not any(self._loads.values()):
                self._busy_since = time.perf_counter()
            self._loads[server] += 1
        if place.server is not None:
            self._loads[place.server] -= 1
            if not any(self._loads.values()):
                self._tally.seconds += time.perf_counter() - self._busy_since
        place.server = server

    async def read_tally(self) -> Tally:
        """Counts of what was done since the last call."""
        tally = self._tally
        self._tally = Tally()
        events = self.membership.events
        self.membership.events = Events()
        tally.serving, tally.empty = len(self.membership.serving), len(self.membership.empty)
        tally.lost, tally.back = events.lost, events.back
        if any(self._loads.values()):
            now = time.perf_counter()
            tally.seconds += now - self._busy_since
            self._busy_since = now
        return tally
