"""A fleet whose groups are placed by sglang-router as long as it lives, and by the fleet itself
when it does not.

The router's workers are kept the servers that serve. It says of no response which server has it: so
whatever breaks off there, or is in work there when a server is lost, is asked for again, of a
server of the fleet's own choice, which then is judged as ever. Everything here runs in one asyncio
loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Sequence
from typing import Any

from megatron_efr import log
from megatron_efr.config import TimeoutsConfig
from megatron_efr.errors import EngineError
from megatron_efr.rollout.servers.process import ServerProcess
from megatron_efr.rollout.sglang.fleet import Fleet, Place
from megatron_efr.rollout.sglang.health import MISSES, unless
from megatron_efr.rollout.sglang.router import Router
from megatron_efr.rollout.sglang.server import Answer, Server
from megatron_efr.types import Sampling

SOON_S = 0.2
"""Between two looks at a router whose workers are not yet the servers that serve."""

ADD_AGAIN_S = 60.0
"""After which a server that the router was to take in, and has not, is offered again."""


class RoutedFleet(Fleet):
    """A `Fleet` behind the router that `process` runs; one that ends or hangs is started again
    `restarts` times.
    """

    def __init__(
        self,
        urls: Sequence[str],
        key: str | None,
        limits: TimeoutsConfig,
        process: ServerProcess,
        restarts: int,
    ) -> None:
        super().__init__(urls, key, limits)
        self._router = Router(process.url, self._session, limits)
        self._loads[self._router] = 0
        self._key = key
        self._limits = limits
        self._process = process
        self._restarts = restarts
        self._usable = False
        self._workers = set[str]()  # servers that the router chooses from
        self._offered: dict[str, float] = {}
        self._broken = asyncio.Event()  # for all that is in work there now
        self._examination: asyncio.Future[Any] | None = None
        self._keeper = asyncio.create_task(self._keep())

    async def close(self) -> None:
        self._keeper.cancel()
        await super().close()

    # -- responses
    # ----------------------------------------------------------------------------------------------

    @property
    def routed(self) -> bool:
        """True if the next group goes through the router."""
        return (
            self._usable
            and self._workers == self.membership.serving_urls
            and not self._keeper.done()
        )

    async def _choose(self) -> Server:
        least_loaded = await super()._choose()  # waits for a publication that is going on
        return self._router if self.routed else least_loaded

    async def _draw(
        self, place: Place, name: str, tokens: tuple[int, ...], sampling: Sampling
    ) -> Answer:
        if (
            place.server is self._router
            and (answer := await self._through_router(tokens, sampling)) is not None
        ):
            return answer
        return await super()._draw(place, name, tokens, sampling)

    async def _through_router(self, tokens: tuple[int, ...], sampling: Sampling) -> Answer | None:
        """A draw, or None if it must be asked for without the router."""
        if not self.routed:  # any more, since the group was placed
            return None
        asked = self._router.generate(self._new_rid(), tokens, sampling)
        try:
            return await unless(self._broken, asked, f"{self._router.url}: broken off")
        except EngineError:
            self._tally.resent += 1
            await self._doubt()
            return None

    async def _doubt(self) -> None:
        """A response failed, and the router or any server may be why: look at all, once for all
        that fail together.
        """
        self._usable = False  # until it has answered
        self.membership.told.set()
        if self._examination is None or self._examination.done():
            self._examination = asyncio.gather(
                *map(self.membership.examine, self.membership.serving)
            )
        await asyncio.shield(self._examination)

    # -- the router
    # ----------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Keep it in step with the servers that serve, and start it again when it fails."""
        for left in reversed(range(self._restarts + 1)):
            fault = await self._until_it_fails()
            self._break()
            then = (
                (f"it is started again, and {left - 1} times more at most")
                if left
                else "it stays down"
            )
            log.warning(
                f"router {self._router.url} {fault}: the fleet places its prompts itself; {then}"
            )
            await asyncio.to_thread(self._process.end)
            self._offered.clear()
            if left:
                self._process.start()

    async def _until_it_fails(self) -> str:
        """Watch it until something is wrong with it, and name that."""
        began = time.monotonic()
        missed, counted = 0, -math.inf
        error = "it never answered"
        ready = False
        while (code := self._process.process.poll()) is None:
            self.membership.told.clear()
            try:
                settled = await self._tend()
            except EngineError as failure:
                self._break()
                settled = False
                error = str(failure)
                # responses that fail together have it looked at many times in one moment
                if ready and time.monotonic() - counted >= self._limits.check_s:
                    missed, counted = missed + 1, time.monotonic()
            else:
                missed, ready = 0, True
            if missed == MISSES or (not ready and time.monotonic() - began > self._limits.start_s):
                return f"does not answer ({error})"
            with contextlib.suppress(TimeoutError):
                wait = self._limits.check_s if settled or missed else SOON_S
                await asyncio.wait_for(self.membership.told.wait(), wait)
        return f"ended with exit code {code}"

    async def _tend(self) -> bool:
        """True if its workers are the servers that serve; if not, have it change them."""
        if not self._workers <= self.membership.current_urls:
            # what a lost server had will not be answered by it, or not with known weights
            self._break()
        names = await self._router.workers()
        for url in names.keys() - self.membership.current_urls:
            self._offered.pop(url, None)
            await self._router.remove(names[url])
        for url in self.membership.serving_urls - names.keys():
            if time.monotonic() - self._offered.get(url, -ADD_AGAIN_S) >= ADD_AGAIN_S:
                self._offered[url] = time.monotonic()
                await self._router.add(url, self._key)
        self._usable = True
        self._workers = set(names)
        return self._workers == self.membership.serving_urls

    def _break(self) -> None:
        """Use it no more, for now, and have all that is in work there asked for again."""
        self._usable = False
        self._workers = set()
        self._broken.set()
        self._broken = asyncio.Event()
