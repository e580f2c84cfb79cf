"""Responses in the making, one a row of the batch: their tokens, how far each may go, and what
their scripts order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_efr.rollout.driver import Drawing, Driver, TokenPenalty, Writing
from megatron_efr.steps import Ending
from megatron_efr.types import Prompt, Response, Sampling, VersionSpan

WRITTEN = 0
"""The kind of rows whose next token their script writes; other kinds say which tokens end a
drawing.
"""

GOES_ON, STOPS, HELD = 0, 1, 2
"""Effects of a token on a drawing: nothing, end it and belong to it, end it and be held back."""


@dataclass(slots=True)
class Row:
    """A row's response: whose it is, how it goes on, and from which token on which version made it.

    `branch` numbers the branches of a response from 1; 0 is the response itself.
    """

    prompt: Prompt
    seed: int
    sample: int
    driver: Driver
    deliver: Callable[[Response], None]
    spans: list[tuple[int, int]]  # (version, first token)
    branch: int = 0
    branches: int = 0  # begun so far
    # tokens to come that its script writes
    writing: deque[tuple[int, float]] = field(default_factory=deque)

    def serve(self, version: int, length: int) -> None:
        """Note that what comes after `length` tokens is made by `version`."""
        if self.spans[-1][0] != version:
            self.spans = [span for span in self.spans if span[1] < length] + [(version, length)]


@dataclass(slots=True)
class Entry:
    """A row outside the batch: tokens of prompt and response, and the response's log-probs, those
    held back too.

    `kv` [layers, 2, kv heads, >= tokens - 1, head dim] is what the weights of number `publication`
    made of its tokens.
    """

    row: Row
    tokens: np.ndarray
    logprobs: np.ndarray
    kv: torch.Tensor | None = None
    publication: int = -1

    @property
    def prompt(self) -> int:
        return len(self.tokens) - len(self.logprobs)

    @property
    def length(self) -> int:
        """Tokens that are not held back."""
        return len(self.tokens) - self.row.driver.holds

    def response(self, decode: Callable[[tuple[int, ...]], str]) -> Response:
        """The response that the row has become."""
        end = self.length - self.prompt
        tokens = tuple(self.tokens[self.prompt : self.length].tolist())
        spans = self.row.spans
        ends = [start for _, start in spans[1:]] + [end]
        versions = tuple(
            VersionSpan(v, start, end) for (v, start), end in zip(spans, ends, strict=True)
        )
        driver = self.row.driver
        return Response(
            tokens,
            self.logprobs[:end],
            driver.finish,
            versions,
            decode(tokens),
            parts=tuple(driver.parts),
            branches=tuple(driver.branches),
        )


class Rows:
    """The state of a batch's rows, of which 0 .. active-1 are in use.

    A row holds prompt and response as `tokens[row, :length]`, of which the first `prompt` were
    there at its beginning.
    """

    def __init__(self, count: int, vocab: int, sampling: Sampling) -> None:
        self.active = 0
        self.rows: list[Row | None] = [None] * count
        self.length = np.ones(count, dtype=np.int64)
        self.prompt = np.ones(count, dtype=np.int64)
        # the length at which the present order is over
        self.limit = np.zeros(count, dtype=np.int64)
        self.seed = np.zeros(count, dtype=np.uint64)
        self.sample = np.zeros(count, dtype=np.int64)
        self.branch = np.zeros(count, dtype=np.int64)
        self.kind = np.zeros(count, dtype=np.int64)
        self.temperature = np.full(count, sampling.temperature)
        self.penalised = np.zeros(count, dtype=bool)
        self.tokens = np.zeros((count, 0), dtype=np.int64)
        self.logprobs = np.zeros((count, 0), dtype=np.float32)
        self._stop_ids = list(sampling.stop_ids)
        self._temperature = sampling.temperature
        self._kinds: dict[tuple[int, ...], int] = {}
        self._effect = np.zeros((1, vocab), dtype=np.int8)  # [kind, token]

    def __getitem__(self, index: int) -> Row:
        row = self.rows[index]
        assert row is not None
        return row

    def widen(self, capacity: int) -> None:
        """Make room for so many tokens in every row."""
        more = capacity - self.tokens.shape[1]
        if more > 0:
            self.tokens = np.pad(self.tokens, ((0, 0), (0, more)))
            self.logprobs = np.pad(self.logprobs, ((0, 0), (0, more)))

    def add(self, entry: Entry) -> int:
        """Take a row into the batch, and begin what its script orders; its index."""
        index, row = self.active, entry.row
        self.active += 1
        self.rows[index] = row
        self.tokens[index, : len(entry.tokens)] = entry.tokens
        self.logprobs[index, entry.prompt : len(entry.tokens)] = entry.logprobs
        self.length[index], self.prompt[index] = entry.length, entry.prompt
        self.seed[index], self.sample[index], self.branch[index] = row.seed, row.sample, row.branch
        self.obey(index)
        return index

    def take_out(self, index: int) -> Entry:
        """A row as it would be added again; it still is in the batch."""
        row = self[index]
        prompt = int(self.prompt[index])
        end = int(self.length[index]) + row.driver.holds
        # copies: the place will be another row's
        tokens = self.tokens[index, :end].copy()
        logprobs = self.logprobs[index, prompt:end].copy()
        return Entry(row, tokens, logprobs)

    def move(self, source: int, target: int) -> None:
        """Copy row `source` over row `target`."""
        length = self.length[source]
        numbers = (self.length, self.prompt, self.limit, self.seed, self.sample, self.branch)
        for array in (*numbers, self.kind, self.temperature, self.penalised):
            array[target] = array[source]
        self.tokens[target, :length] = self.tokens[source, :length]
        self.logprobs[target, :length] = self.logprobs[source, :length]
        self.rows[target] = self.rows[source]

    def positions(self, indices: np.ndarray) -> np.ndarray:
        """The position in its response of each row's next token, [indices]."""
        return self.length[indices] - self.prompt[indices]

    def penalties(self, indices: np.ndarray) -> Iterator[tuple[int, TokenPenalty]]:
        """Penalties on the next token's logits, by place in `indices`."""
        for place in np.flatnonzero(self.penalised[indices]).tolist():
            row = int(indices[place])
            order = self[row].driver.order
            if isinstance(order, Drawing) and (penalty := order.penalty) is not None:
                first = max(self.prompt[row], self.length[row] - penalty.window)
                if penalty.applies(self.tokens[row, first : self.length[row]].tolist()):
                    yield place, penalty

    def append(self, indices: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        """Give each row its next token: the one drawn, or one that its script writes.

        Returns the rows whose order is over, and for which `follow` is to be called.
        """
        for i in np.flatnonzero(self.kind[indices] == WRITTEN):
            tokens[i], logprobs[i] = self[int(indices[i])].writing.popleft()
        at = self.length[indices]
        self.tokens[indices, at] = tokens
        self.logprobs[indices, at] = logprobs
        self.length[indices] = at + 1
        effect = self._effect[self.kind[indices], tokens]
        return indices[(effect != GOES_ON) | (at + 1 == self.limit[indices])]

    def going_on(self, index: int) -> bool:
        """True if the row's next token is to be drawn or written."""
        return isinstance(self[index].driver.order, (Drawing, Writing))

    def follow(self, index: int) -> None:
        """Tell row `index`'s script that its order is over, and begin what it orders then, as
        `obey` does.
        """
        row = self[index]
        token = int(self.tokens[index, self.length[index] - 1])
        effect = self._effect[self.kind[index], token]
        if isinstance(row.driver.order, Writing):
            self._done(index, row.driver.order.ending)
        elif effect == HELD:
            self.length[index] -= 1
            self._done(index, "until", token)
        else:
            self._done(index, "stop" if effect == STOPS else "length")
        self.obey(index)

    def obey(self, index: int) -> None:
        """Begin what the row's driver orders, with the token that it holds back, up to the next
        token to be drawn or written. Its order is then one of these; or to fork, or None, which are
        not the batch's to carry out.
        """
        row = self[index]
        driver = row.driver
        while isinstance(order := driver.order, (Drawing, Writing)):
            # the order's kind and end, as columns of the row
            if isinstance(order, Drawing):
                self.kind[index] = self._kind(order.until)
                self.limit[index] = self.length[index] + order.limit
                own = order.temperature
                self.temperature[index] = self._temperature if own is None else own
                self.penalised[index] = order.penalty is not None
            else:
                self.kind[index] = WRITTEN
                self.limit[index] = self.length[index] + len(order.tokens)
                row.writing.extend(zip(order.tokens, order.logprobs, strict=True))
            # a token that was held back is the first of it, unless it is written
            if not driver.holds:
                return
            at = int(self.length[index])  # its logits have been used, for the token held back
            if row.writing:
                self.tokens[index, at], self.logprobs[index, at] = row.writing.popleft()
            self.length[index] = at + 1
            # one token may be all of the order: then ask for the next
            stops = isinstance(order, Drawing) and int(self.tokens[index, at]) in self._stop_ids
            if not stops and at + 1 < self.limit[index]:
                return
            self._done(
                index, order.ending if isinstance(order, Writing) else "stop" if stops else "length"
            )

    def _done(self, index: int, ending: Ending, met: int | None = None) -> None:
        tokens = self.tokens[index, self.prompt[index] : self.length[index]]
        self[index].driver.done(tokens, ending, met)

    def _kind(self, until: tuple[int, ...]) -> int:
        """The number of the drawings that end at stop ids and before the tokens `until`."""
        if until not in self._kinds:
            effect = np.zeros((1, self._effect.shape[1]), dtype=np.int8)
            effect[0, self._stop_ids] = STOPS
            effect[0, list(until)] = HELD
            self._kinds[until] = len(self._effect)
            self._effect = np.concatenate((self._effect, effect))
        return self._kinds[until]
