"""Several SGLang servers as one: a call to all of them, and whole groups from the least loaded.

Everything here runs in one asyncio loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import aiohttp

from megatron_efr.config import TimeoutsConfig
from megatron_efr.rollout.server import AbortedError, Answer, LostError, Server
from megatron_efr.types import Group, Request, Sampling
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.publish import EngineError

T = TypeVar("T")

SENDS = 3
"""How often one response is asked for, where its server fails."""

REST_S = 30.0
"""How long a server that lost a response is passed over, where there are others."""

IDLE_S = 3.0
"""How long an unused connection is kept: less than the 5 s after which SGLang's web server closes it."""


@dataclass(slots=True)
class Tally:
    """What was done since it was last read."""

    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    resent: int = 0
    seconds: float = 0.0  # in which at least one response was being generated


class Fleet:
    """Servers that share one connection pool. Responses to a prompt come from one server, and share its cache."""

    def __init__(
        self, urls: Sequence[str], key: str | None, limits: TimeoutsConfig, routed: Architecture | None = None
    ) -> None:
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S)
        self._session = aiohttp.ClientSession(connector=connector, headers=headers, read_bufsize=2**20)
        self.servers = [Server(url, self._session, limits, routed) for url in urls]
        self._loads = dict.fromkeys(self.servers, 0)
        self._rests_until = dict.fromkeys(self.servers, 0.0)
        self._name, self._numbers = uuid.uuid4().hex[:12], itertools.count()
        self._tally, self._busy_since = Tally(), 0.0

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def all(self, call: Callable[[Server], Awaitable[T]]) -> list[T]:
        """Make `call` of every server at once and wait for all; EngineError has the words of all that failed."""
        results = await asyncio.gather(*(call(server) for server in self.servers), return_exceptions=True)
        failed = [result for result in results if isinstance(result, BaseException)]
        for error in failed:
            if not isinstance(error, EngineError):
                raise error
        if len(failed) == 1:
            raise failed[0]
        if failed:
            raise EngineError("; ".join(map(str, failed))) from failed[0]
        return [result for result in results if not isinstance(result, BaseException)]

    async def group(self, request: Request, sampling: Sampling) -> Group:
        """The whole group that answers `request`, from the server with the fewest responses in work."""
        server = self._least_loaded()
        tasks = [asyncio.create_task(self._response(server, request, sampling)) for _ in range(request.samples)]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        for answer in answers:
            self._tally.tokens += answer.response.length
            self._tally.prompt_tokens += len(request.prompt.tokens)
            self._tally.cached_tokens += answer.cached_tokens
        return Group(request.prompt, [answer.response for answer in answers], seed=request.seed)

    async def _response(self, server: Server, request: Request, sampling: Sampling) -> Answer:
        """One response; one that was lost is asked for again, under a new name, of the server least loaded then."""
        for attempt in itertools.count(1):
            rid = f"{self._name}-{next(self._numbers)}"
            try:
                with self._counted(server):
                    return await server.generate(rid, request.prompt.tokens, sampling)
            except (LostError, AbortedError) as error:
                if attempt == SENDS:
                    raise EngineError(f"prompt {request.prompt.id}: lost {SENDS} times: {error}") from error
            self._tally.resent += 1
            self._rests_until[server] = time.monotonic() + REST_S
            with contextlib.suppress(EngineError):  # where the server is gone, so is the request
                await server.abort(rid)
            await asyncio.sleep(attempt)
            server = self._least_loaded()
        raise AssertionError

    def _least_loaded(self) -> Server:
        now = time.monotonic()
        rested = [server for server in self.servers if self._rests_until[server] <= now]
        return min(rested or self.servers, key=self._loads.__getitem__)

    @contextlib.contextmanager
    def _counted(self, server: Server) -> Iterator[None]:
        """Count a response in work against its server, and the time in which there is any."""
        if not any(self._loads.values()):
            self._busy_since = time.perf_counter()
        self._loads[server] += 1
        try:
            yield
        finally:
            self._loads[server] -= 1
            if not any(self._loads.values()):
                self._tally.seconds += time.perf_counter() - self._busy_since

    async def read_tally(self) -> Tally:
        """What was done since the last call."""
        tally, self._tally = self._tally, Tally()
        if any(self._loads.values()):
            now = time.perf_counter()
            tally.seconds += now - self._busy_since
            self._busy_since = now
        return tally
