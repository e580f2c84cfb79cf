"""Placement of groups by a fleet, and its trust in servers, without a server: the wire to each ends
in the test.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from megatron_efr.config import TimeoutsConfig
from megatron_efr.errors import LostError, NoEngineError
from megatron_efr.rollout.codec import NoText
from megatron_efr.rollout.sglang.fleet import Fleet
from megatron_efr.rollout.sglang.server import Server
from megatron_efr.scripts import plain
from megatron_efr.types import Group, Prompt, Sampling

TOKENS = [3, 4]
NEVER = TimeoutsConfig(check_s=1000)


class Wired(Server):
    """A server that answers as a test wants: weights that are `named` so, and responses when they
    are let go.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.named, self.cuts = "1", 0
        # the prompt's first token, and what lets a response go
        self.working: list[tuple[int, asyncio.Event]] = []

    @property
    def prompts(self) -> list[int]:
        return [prompt for prompt, _ in self.working]

    def let_go(self, prompt: int, count: int = 1000) -> None:
        """End so many of the responses to a prompt."""
        for _, event in [held for held in self.working if held[0] == prompt][:count]:
            event.set()

    async def _request(self, method: str, path: str, body: Any, limit: str) -> Any:
        if path == "/generate":
            return await self._respond(body["input_ids"][0])
        return {"success": True, "message": "", "weight_version": self.named}

    async def _respond(self, prompt: int) -> dict[str, Any]:
        if self.cuts:
            self.cuts -= 1
            raise LostError(f"{self.url}: cut")
        held = prompt, asyncio.Event()
        self.working.append(held)
        try:
            await held[1].wait()
        finally:
            self.working.remove(held)
        meta = {
            "finish_reason": {"type": "length"},
            "weight_versions": [{"version": self.named, "start": 0, "end": 2}],
            "output_token_logprobs": [[-1.0, token, None] for token in TOKENS],
            "cached_tokens": 0,
        }
        return {"output_ids": TOKENS, "meta_info": meta}


class Placed:
    """A fleet of wired servers that serve version 1, and groups that are asked of it."""

    def __init__(self, limits: TimeoutsConfig, count: int) -> None:
        self.fleet = Fleet([f"http://server-{i}:1" for i in range(count)], None, limits)
        self.servers: list[Wired] = self.fleet.servers  # type: ignore[assignment]
        self.asked: list[asyncio.Task[Group]] = []

    async def serve(self) -> None:
        await self.fleet.membership.begin()
        self.fleet.membership.end(1)

    async def ask(self, samples: int) -> list[list[int]]:
        """Ask for one more group, of a prompt of its own number; whose responses each server has
        then.
        """
        number = len(self.asked)
        request = plain(Prompt(f"p{number}", (number,), "", ""), samples, seed=number)
        self.asked.append(
            asyncio.create_task(self.fleet.group(request, Sampling(1.0, 1.0, 8, ()), NoText()))
        )
        return await self.settle()

    async def settle(self) -> list[list[int]]:
        for _ in range(50):
            await asyncio.sleep(0)
        return [server.prompts for server in self.servers]

    async def finish(self) -> list[Group]:
        """Let all responses go, wherever they are, until every group is there."""
        while not all(task.done() for task in self.asked):
            for server in self.servers:
                for prompt in set(server.prompts):
                    server.let_go(prompt)
            await asyncio.sleep(0.01)
        return [task.result() for task in self.asked]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a test in the loop that its fleet lives in."""
    monkeypatch.setattr("megatron_efr.rollout.sglang.fleet.Server", Wired)

    def run(
        test: Callable[[Placed], Awaitable[None]], count: int = 3, limits: TimeoutsConfig = NEVER
    ) -> None:
        async def whole() -> None:
            placed = Placed(limits, count)
            try:
                await placed.serve()
                await test(placed)
            finally:
                for task in placed.asked:
                    task.cancel()
                await placed.fleet.close()

        asyncio.run(asyncio.wait_for(whole(), 60))

    return run


def test_a_whole_group_goes_to_the_server_with_the_fewest_responses_in_work(
    run: Callable[..., None],
) -> None:
    async def test(placed: Placed) -> None:
        a = placed.servers[0]
        assert await placed.ask(6) == [[0] * 6, [], []]
        assert await placed.ask(1) == [[0] * 6, [1], []]
        assert await placed.ask(3) == [[0] * 6, [1], [2] * 3]
        # in turn it would be the first server's
        assert await placed.ask(1) == [[0] * 6, [1, 3], [2] * 3]
        assert await placed.ask(2) == [[0] * 6, [1, 3, 4, 4], [2] * 3]
        assert (await placed.ask(1))[2] == [2, 2, 2, 5]
        a.let_go(0, 4)  # counted as each response ends, not with its group
        assert await placed.settle() == [[0, 0], [1, 3, 4, 4], [2, 2, 2, 5]]
        assert (await placed.ask(4))[0] == [0, 0, 6, 6, 6, 6]
        groups = await placed.finish()
        assert [len(group.responses) for group in groups] == [6, 1, 3, 1, 2, 1, 4]
        assert set(placed.fleet._loads.values()) == {0}

    run(test)


def test_a_server_that_lost_a_response_is_passed_over_while_others_serve(
    run: Callable[..., None],
) -> None:
    async def test(placed: Placed) -> None:
        a, b = placed.servers
        a.cuts = 1
        await placed.ask(1)
        await asyncio.sleep(1.2)  # before a response is asked for again
        assert [a.prompts, b.prompts] == [[], [0]]
        assert await placed.ask(3) == [[], [0, 1, 1, 1]]  # it has none in work, and still gets none
        placed.fleet.membership.lose(b, "killed")
        await asyncio.sleep(0.1)
        assert await placed.ask(1) == [[0, 1, 1, 1, 2], []]  # but if it is the only one
        assert len(await placed.finish()) == 3
        assert (await placed.fleet.read_tally()).resent == 5

    run(test, count=2)


def test_a_server_that_restarts_empty_between_health_checks_is_found_out_by_its_answer(
    run: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    async def test(placed: Placed) -> None:
        a, b = placed.servers
        await placed.ask(2)
        await placed.ask(2)
        a.named = "default"  # SGLang's name for weights that nobody named
        a.let_go(0, 1)
        # the other response is not waited for either
        assert await placed.settle() == [[], [1, 1, 0, 0]]
        assert (await placed.ask(1))[1] == [1, 1, 0, 0, 2]
        groups = await placed.finish()
        assert {
            span.version
            for group in groups
            for response in group.responses
            for span in response.versions
        } == {1}
        tally = await placed.fleet.read_tally()
        assert (tally.serving, tally.lost, tally.back, tally.resent) == (1, 1, 0, 2)
        placed.fleet.membership.lose(b, "killed")
        with pytest.raises(NoEngineError, match="none of 2 servers is left that serves version 1"):
            await placed.fleet.membership.settled_serving()

    run(test, count=2)
    assert (
        "http://server-0:1 is lost: it has restarted, with weights 'default' and not '1'"
    ) in capfd.readouterr().err


def test_a_health_check_finds_out_a_server_that_restarted_empty_and_the_next_publication_takes_it_in(
    run: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    async def test(placed: Placed) -> None:
        a, b = placed.servers
        assert placed.fleet.membership.serving == [a, b]
        a.named = "default"
        await asyncio.sleep(0.2)
        assert placed.fleet.membership.serving == [b]
        assert await placed.ask(3) == [[], [0, 0, 0]]
        await placed.serve()
        assert placed.fleet.membership.changed
        a.named = "1"  # as the publication named them
        assert placed.fleet.membership.serving == [a, b]
        assert await placed.ask(1) == [[1], [0, 0, 0]]
        tally = await placed.fleet.read_tally()
        assert (tally.serving, tally.lost, tally.back, tally.resent) == (2, 1, 1, 0)

    run(test, count=2, limits=TimeoutsConfig(check_s=0.02))
    err = capfd.readouterr().err
    assert [err.count(f"[{event}] engine http://server-0:1 ") for event in ("lost", "back")] == [
        1,
        1,
    ]
    assert [err.count(f"[{event}]") for event in ("lost", "back")] == [1, 1]


def test_no_requests_id_begins_with_another() -> None:
    """SGLang's abort takes every request whose id begins with the one that it is given."""

    async def ids() -> list[str]:
        found = []
        for _ in range(2):
            fleet = Fleet(["http://127.0.0.1:1"], None, NEVER)
            found += [fleet._new_rid() for _ in range(1100)]
            await fleet.close()
        return found

    found = sorted(asyncio.run(ids()))  # an id stands just before those that begin with it
    assert len(set(found)) == 2200
    assert not any(later.startswith(one) for one, later in itertools.pairwise(found))
