"""The watch over a router, without one: its process and its answers are the test's."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_efr.config import TimeoutsConfig
from megatron_efr.errors import LostError
from megatron_efr.rollout.sglang.health import MISSES
from megatron_efr.rollout.sglang.routed_fleet import RoutedFleet
from megatron_efr.rollout.sglang.router import Router

CHECK_S = 0.2
LIMITS = TimeoutsConfig(check_s=CHECK_S)


class Process:
    """A router's process that ends when the test says so."""

    url = "http://router:1"

    def __init__(self) -> None:
        self.code: int | None = None
        self.process = SimpleNamespace(poll=lambda: self.code)


@pytest.mark.parametrize("ends", [True, False])
def test_failures_of_one_moment_are_one_miss_so_that_a_router_that_ends_is_known_to_have_ended(
    ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[float] = []

    async def workers(router: Router) -> dict[str, str]:
        looked.append(asyncio.get_running_loop().time())
        if len(looked) > 1:  # it was ready once
            raise LostError(f"{router.url}: refused")
        return {}

    monkeypatch.setattr(Router, "workers", workers)

    async def watch() -> tuple[str, float]:
        process = Process()
        arguments: Any = ([], None, LIMITS, process, 0)
        fleet = RoutedFleet(*arguments)
        fleet._keeper.cancel()  # pyright: ignore[reportPrivateUsage]
        watched = asyncio.create_task(fleet._until_it_fails())  # pyright: ignore[reportPrivateUsage]
        began = asyncio.get_running_loop().time()
        for _ in range(4 * MISSES):  # each failed response has the router looked at
            fleet.membership.told.set()
            await asyncio.sleep(0.005)
        # its supervisor ends after it
        process.code = 137 if ends else None
        fault = await watched
        took = asyncio.get_running_loop().time() - began
        await fleet.close()
        return fault, took

    fault, took = asyncio.run(watch())
    assert len(looked) > 2 * MISSES
    if ends:
        assert fault == "ended with exit code 137"
    else:
        assert fault == "does not answer (http://router:1: refused)"
        assert took >= (MISSES - 1) * CHECK_S
