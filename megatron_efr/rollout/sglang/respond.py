"""One response from SGLang: its script driven with one request for each draw, the tokens so far in
its prompt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, replace

import numpy as np

from megatron_efr.rollout.driver import Drawing, Driver, Forking, Scoring, Writing
from megatron_efr.rollout.sglang.penalty import PenalisedSampling
from megatron_efr.steps import Ending
from megatron_efr.types import Response, Sampling, VersionSpan

Ask = Callable[[tuple[int, ...], Sampling], Awaitable[Response]]
"""Has a server go on from tokens; a token that stops it is the last of the response."""


async def respond(driver: Driver, begun: tuple[int, ...], sampling: Sampling, ask: Ask) -> Response:
    """Make the response of `driver`'s script from the tokens `begun`, with `ask` for its draws.

    Branches are asked for together."""
    growing = _Growing(begun, driver)
    while (order := driver.order) is not None:
        match order:
            case Drawing():
                await growing.draw(order, sampling, ask)
            case Writing():
                growing.write(order)
            case Forking():
                starts = [(*growing.so_far(length), *after) for length, after in order.starts]
                branches = [
                    respond(driver.branch(i), start, sampling, ask)
                    for i, start in enumerate(starts)
                ]
                driver.forked(growing.seen(await _all(branches)))
            case Scoring(scores):
                driver.scored(await asyncio.to_thread(scores))
    return await growing.whole(sampling, ask)


class _Growing:
    """A response in the making; `held` is the token that is held back, with its log-prob."""

    def __init__(self, begun: tuple[int, ...], driver: Driver) -> None:
        self._begun, self._driver = begun, driver
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._held: tuple[int, float] | None = None
        self._starts: list[tuple[int, int]] = []  # (version, first token)
        self._routed: np.ndarray | None = None
        self._seen = 0  # the version that drew the latest branches

    def so_far(self, length: int) -> tuple[int, ...]:
        """The tokens of the prompt and the first `length` of the response."""
        return (*self._begun, *self._tokens[:length])

    def seen(self, branches: list[Response]) -> list[Response]:
        """The branches, whose version is noted: the response may go on with their tokens."""
        self._seen = max(
            (span.version for made in branches for span in made.versions), default=self._seen
        )
        return branches

    def write(self, order: Writing) -> None:
        """Let the script write: a token that is held back gives its place up."""
        self._held = None
        if order.ending not in ("forced", "chosen"):
            self._starts.append((self._seen, len(self._tokens)))
        self._tokens += order.tokens
        self._logprobs += order.logprobs
        self._done(order.ending)

    async def draw(self, order: Drawing, sampling: Sampling, ask: Ask) -> None:
        """Have the model go on, first with a token that is held back."""
        limit = order.limit
        ends = (*sampling.stop_ids, *order.until)
        if self._held is not None:
            token, logprob = self._held
            self._tokens.append(token)
            self._logprobs.append(logprob)
            self._held = None
            limit = limit - 1
            if token in sampling.stop_ids or not limit:
                self._end(sampling, ())
                return
        first = len(self._tokens)
        temperature = sampling.temperature if order.temperature is None else order.temperature
        asked = replace(sampling, temperature=temperature, max_new_tokens=limit, stop_ids=ends)
        if order.penalty is not None:
            asked = PenalisedSampling(
                **asdict(asked), penalty=order.penalty, begun=len(self._begun)
            )
        drawn = await ask(self.so_far(first), asked)
        self._tokens += drawn.tokens
        self._logprobs += drawn.logprobs.tolist()
        self._starts += [(span.version, first + span.start) for span in drawn.versions]
        self._routed = drawn.routed_experts
        self._end(sampling, order.until)

    def _end(self, sampling: Sampling, until: tuple[int, ...]) -> None:
        """Say how a draw ended: by its last token, since a server says `length` of whatever stands
        at the limit.
        """
        last = self._tokens[-1]
        if last in until:
            self._held = self._tokens.pop(), self._logprobs.pop()
            self._done("until", last)
        else:
            self._done("stop" if last in sampling.stop_ids else "length")

    def _done(self, ending: Ending, met: int | None = None) -> None:
        self._driver.done(self._tokens, ending, met)

    async def whole(self, sampling: Sampling, ask: Ask) -> Response:
        """The response, complete."""
        read = len(self._begun) + len(self._tokens) - 1
        # of what a script wrote behind the last draw
        if self._routed is not None and len(self._routed) < read:
            # the last token is left to be drawn again: behind it there may be no position in the
            # context
            again = await ask(
                self.so_far(len(self._tokens) - 1), replace(sampling, max_new_tokens=1)
            )
            self._routed = again.routed_experts
        return Response(
            tuple(self._tokens),
            np.array(self._logprobs, dtype=np.float32),
            self._driver.finish,
            self._versions(),
            routed_experts=None if self._routed is None else self._routed[:read],
            parts=tuple(self._driver.parts),
            branches=tuple(self._driver.branches),
        )

    def _versions(self) -> tuple[VersionSpan, ...]:
        """Spans of tokens by the weights that made them; none without a draw.

        A script's tokens count as made by the weights that drew before them.
        """
        if not self._starts:
            return ()
        starts = [
            start
            for i, start in enumerate(self._starts)
            if i == 0 or start[0] != self._starts[i - 1][0]
        ]
        ends = [first for _, first in starts[1:]] + [len(self._tokens)]
        return tuple(
            VersionSpan(version, first if i else 0, end)
            for i, ((version, first), end) in enumerate(zip(starts, ends, strict=True))
        )


async def _all(responses: Iterable[Awaitable[Response]]) -> list[Response]:
    """All of them; if one fails the others are given up."""
    tasks = [asyncio.ensure_future(response) for response in responses]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
