"""One call of `generate` on the embedded engine: continuous batching of responses, each driven by
its script.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import torch

from megatron_efr.rollout.checks import check_request
from megatron_efr.rollout.driver import Driver, Forking, Scoring
from megatron_efr.rollout.local.core import Core, Tally
from megatron_efr.rollout.local.decoder import CHUNK, Cache, Decoder, round_up
from megatron_efr.rollout.local.rows import WRITTEN, Entry, Row, Rows
from megatron_efr.rollout.local.sampling import draw_rows, lowered, uniforms
from megatron_efr.types import Group, Request, Response, Sampling

READ_TOGETHER = 256
"""Tokens of prompts up to which a prefill takes hardly longer than a few of them do: it reads all
weights.
"""


@dataclass(slots=True)
class _Open:
    """A request with unfinished responses. Its prompt is prefilled once: every sample starts from
    `kv`, `logits`.
    """

    request: Request
    responses: list[Response | None]
    started: int = 0
    # [layers, 2, kv heads, >= prompt, head dim], while samples remain to be started
    kv: torch.Tensor | None = None
    logits: torch.Tensor | None = None  # [vocab]


class Stream(Iterator[Group]):
    """One call of `generate`: the rows of the engine's cache, and what waits for a place among
    them.

    The cache holds all but the last token of a row.
    """

    def __init__(self, core: Core, requests: Iterable[Request], sampling: Sampling) -> None:
        self._core = core
        self._requests = iter(requests)
        self._sampling = sampling
        self._waiting: deque[_Open] = deque()  # prefilled, with samples to start
        # begun, and not in the batch: branches, and what has waited for its own
        self._ready: deque[Entry] = deque()
        self._done: deque[Group] = deque()
        self.closed = False
        self._publication = core.publications
        slots = round_up(core.slots, self._decoder.rows)
        self._rows = Rows(slots, core.architecture.vocab, sampling)
        self._most = 1  # tokens of a sequence
        # active rows whose response has ended, or waits for its branches
        self._ended: list[int] = []

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Group:
        while not self._done:
            with self._core.decoding(self) as tally:
                if self.closed:
                    raise StopIteration
                self._take_up()
                self._fill()
                if self._rows.active:
                    self._step(tally)
                    self._give_back()
                elif not self._done:
                    raise StopIteration
        return self._done.popleft()

    def close(self) -> None:
        """Drop what is unfinished; a thread that waits in `next` gets StopIteration."""
        with self._core.pause_lock.changing():
            self.closed = True

    # -- one token
    # ----------------------------------------------------------------------------------------------

    def _step(self, tally: Tally) -> None:
        """One token for every active row."""
        n = self._rows.active
        padded = round_up(self._rows.active, self._decoder.rows)
        self._rows.length[n:padded] = 1  # rows that only fill up the batch
        rows = np.arange(padded)
        positions = self._rows.length[:padded] - 1
        last = self._rows.tokens[rows, positions]
        cache = self._reserve(padded, int(positions.max()) + 2)
        keys = [
            int(positions[first : first + CHUNK].max()) + 1 for first in range(0, padded, CHUNK)
        ]
        logits = self._decoder.step(self._to_device(last), self._to_device(positions), cache, keys)
        tally.steps += 1
        tally.rows += n
        self._append(rows[:n], logits)

    def _append(self, indices: np.ndarray, logits: torch.Tensor) -> None:
        """Give the rows `indices` their next token, drawn from the first of `logits` unless their
        script writes it.
        """
        rows, sampling = self._rows, self._sampling
        at = rows.positions(indices)
        uniform = uniforms(rows.seed[indices], rows.sample[indices], at, rows.branch[indices])
        temperatures = rows.temperature[indices]
        logits = lowered(logits[: len(indices)], rows.penalties(indices))
        found = draw_rows(logits, self._to_device(uniform), temperatures, sampling.top_p)
        tokens, logprobs = (each.cpu().numpy() for each in found)
        if not np.isfinite(logprobs).all():
            self._core.cache, self.closed = None, True  # what is not finite is not hidden by a mask
            bad = rows[int(indices[np.flatnonzero(~np.isfinite(logprobs))[0]])]
            raise RuntimeError(
                f"prompt {bad.prompt.id}: the weights give logits that are not finite"
            )
        self._core.tally.tokens += int(np.count_nonzero(rows.kind[indices] != WRITTEN))
        for index in rows.append(indices, tokens, logprobs).tolist():
            rows.follow(index)
            self._look_at(index)

    def _look_at(self, index: int) -> None:
        """Take row `index` out of the batch if its response is whole, or waits for its branches."""
        if self._rows.going_on(index):
            return
        entry = self._rows.take_out(index)
        if isinstance(entry.row.driver.order, Forking | Scoring):
            assert self._core.cache is not None
            entry.kv = self._core.cache.read(index, len(entry.tokens) - 1)
            entry.publication = self._publication
        self._ended.append(index)
        self._go_on(entry)

    # -- scripts
    # ----------------------------------------------------------------------------------------------

    def _go_on(self, entry: Entry) -> None:
        """Hand a whole response on, start the branches that it asks for, or let it wait for a place
        in the batch.
        """
        match entry.row.driver.order:
            case None:
                entry.row.deliver(entry.response(self._core.codec.decode))
            case Forking() as fork:
                self._fork(entry, fork)
            case Scoring(scores):
                entry.row.driver.scored(scores())
                self._go_on(entry)
            case _:
                self._ready.append(entry)

    def _fork(self, entry: Entry, fork: Forking) -> None:
        """Have branches made of the beginnings of a response, which share its cache."""
        row, starts = entry.row, fork.starts
        responses: list[Response | None] = [None] * len(starts)
        for number, (at, after) in enumerate(starts):
            row.branches += 1
            branch = Row(
                row.prompt,
                row.seed,
                row.sample,
                row.driver.branch(number),
                partial(self._join, entry, responses, number),
                [(self._core.version, 0)],
                branch=row.branches,
            )
            begun = Entry(
                branch,
                entry.tokens[: entry.prompt + at],
                entry.logprobs[:0],
                entry.kv,
                entry.publication,
            )
            if after:  # to be read: no cache has them
                begun = Entry(branch, np.append(begun.tokens, after), begun.logprobs)
            self._ready.append(begun)

    def _join(
        self, entry: Entry, responses: list[Response | None], number: int, response: Response
    ) -> None:
        """Take a branch's response; with the last of them its own goes on."""
        responses[number] = response
        whole = [each for each in responses if each is not None]
        if len(whole) == len(responses):
            entry.row.driver.forked(whole)
            self._go_on(entry)

    def _deliver(self, owner: _Open, sample: int, response: Response) -> None:
        """Take a whole response; with the last of them its group is done."""
        owner.responses[sample] = response
        responses = tuple(each for each in owner.responses if each is not None)
        if len(responses) == owner.request.samples:
            request = owner.request
            self._done.append(
                Group(request.prompt, responses, request.seed, request.scripts, request.note)
            )

    # -- the batch
    # ----------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Take ended responses out of the batch and start waiting ones, until no row is free or
        nothing waits.
        """
        while True:
            for index in sorted(self._ended, reverse=True):
                self._close(index)
            self._ended.clear()
            while room := min(len(self._ready), self._core.slots - self._rows.active):
                self._put([self._ready.popleft() for _ in range(room)])
            free = self._core.slots - self._rows.active
            self._pull(free)
            started = [
                self._start(self._waiting[0]) for _ in range(min(free, self._samples_waiting()))
            ]
            if not started:
                if self._ended:
                    continue
                return
            indices, logits = zip(*started, strict=True)
            going = [i for i, index in enumerate(indices) if self._rows.going_on(index)]
            for index in indices:
                self._look_at(index)
            if going:
                self._append(
                    np.array([indices[i] for i in going]), torch.stack([logits[i] for i in going])
                )

    def _close(self, hole: int) -> None:
        """Fill row `hole` and drop the last row, so that active rows stay together and long ones
        come first.

        Each later chunk gives its longest row to the hole in the chunk before it: chunks stay
        sorted by length, as new rows enter at the end and all grow alike, and attention of a chunk
        runs over little more than it needs.
        """
        rows = self._rows
        for first in range(round_up(hole + 1, CHUNK), rows.active, CHUNK):
            longest = first + int(rows.length[first : min(first + CHUNK, rows.active)].argmax())
            self._move(longest, hole)
            hole = longest
        rows.active -= 1
        if hole != rows.active:
            self._move(rows.active, hole)
        rows.rows[rows.active] = None

    def _start(self, owner: _Open) -> tuple[int, torch.Tensor]:
        """Give `owner`'s next sample a free row; the row, and the logits for its first token."""
        assert owner.kv is not None
        assert owner.logits is not None
        request, sample, logits = owner.request, owner.started, owner.logits
        driver = Driver(
            request.scripts[sample].steps(sample), self._sampling, self._core.codec, request.prompt
        )
        deliver = partial(self._deliver, owner, sample)
        row = Row(request.prompt, request.seed, sample, driver, deliver, [(self._core.version, 0)])
        tokens = np.array(request.prompt.tokens, dtype=np.int64)
        cache = self._reserve(self._rows.active + self._samples_waiting(), len(tokens) + 1)
        index = self._rows.add(Entry(row, tokens, np.zeros(0, dtype=np.float32)))
        cache.write(index, len(tokens), owner.kv)
        owner.started += 1
        if owner.started == request.samples:
            owner.kv = owner.logits = None
            self._waiting.popleft()
        return index, logits

    def _put(self, entries: Sequence[Entry]) -> None:
        """Give what was begun free rows; what no cache has of it, or that of older weights, is read
        together.

        The last token of each is read in the next step: one that is held back, or what takes its
        place, was drawn from those before it.
        """
        longest = max(len(entry.tokens) for entry in entries)
        cache = self._reserve(self._rows.active + len(entries) + len(self._ready), longest + 1)
        unread: list[tuple[int, np.ndarray]] = []
        indices: list[int] = []
        for entry in entries:
            known = entry.tokens[:-1]
            entry.row.serve(self._core.version, len(entry.logprobs))
            indices.append(self._rows.add(entry))
            if entry.publication != self._publication and len(known):
                unread.append((indices[-1], known))
            elif entry.kv is not None:
                cache.write(indices[-1], len(known), entry.kv)
        for which, kv, _ in self._decoder.read([known for _, known in unread]):
            index, known = unread[which]
            cache.write(index, len(known), kv)
        for index in indices:
            self._look_at(index)  # a token that was held back may be the last that is allowed

    def _pull(self, free: int) -> None:
        """Pull and prefill requests until `free` samples wait; if any must be pulled, slots/16 at
        least, and up to slots/4 while all that is read together is short.
        """
        waiting = self._samples_waiting()
        if waiting < free:
            read, slots = 0, self._core.slots
            for request in self._requests:
                most = check_request(
                    request, self._sampling, self._core.architecture, self._core.codec
                )
                self._most = max(self._most, most)
                self._waiting.append(_Open(request, [None] * request.samples))
                waiting += request.samples
                read += len(request.prompt.tokens)
                few = slots // 16 if read >= READ_TOGETHER else slots // 4
                if waiting >= max(free, few):
                    break
        if fresh := [owner for owner in self._waiting if owner.kv is None]:
            self._prefill(fresh)

    def _prefill(self, owners: list[_Open]) -> None:
        prompts = [np.array(owner.request.prompt.tokens, dtype=np.int64) for owner in owners]
        for i, kv, logits in self._decoder.read(prompts):
            owners[i].kv, owners[i].logits = kv, logits

    def _take_up(self) -> None:
        """Rebuild what is not there any more: after a publication, or another stream's turn."""
        if self._publication != self._core.publications:
            self._prefill(list(self._waiting))
        elif self._core.held_by is self:
            return
        rows = self._rows
        live = [i for i in range(rows.active) if i not in self._ended]
        cache = self._reserve(rows.active, int(rows.length[live].max(initial=1)))
        known = [rows.tokens[i, : rows.length[i] - 1] for i in live]
        for which, kv, _ in self._decoder.read(known):
            cache.write(live[which], len(known[which]), kv)
        for i in live:
            rows[i].serve(self._core.version, int(rows.length[i] - rows.prompt[i]))
        self._publication, self._core.held_by = self._core.publications, self

    def _move(self, source: int, target: int) -> None:
        """Move an active row; its last token is not in the cache yet, so that all but it is
        copied.
        """
        length = int(self._rows.length[source])
        self._reserve(self._rows.active, length).move(source, target, length - 1)
        self._rows.move(source, target)

    def _give_back(self) -> None:
        """Free the cache if nothing is unfinished: training has its memory until the next
        request.
        """
        if len(self._ended) == self._rows.active and not self._ready and not self._waiting:
            self._core.cache = None

    def _reserve(self, rows: int, tokens: int) -> Cache:
        """The engine's cache, with room for `tokens` in every row, here and there; for `rows`, or
        all that there are.

        Few responses take few rows, however many there might be.
        """
        core = self._core
        if core.cache is None:
            core.cache = Cache(core.architecture, core.device, self._decoder.cached)
        core.cache.reserve(
            min(round_up(rows, self._decoder.rows), len(self._rows.rows)), tokens, self._most
        )
        self._rows.widen(core.cache.capacity)
        return core.cache

    def _samples_waiting(self) -> int:
        return sum(owner.request.samples - owner.started for owner in self._waiting)

    @property
    def _decoder(self) -> Decoder:
        assert self._core.decoder is not None
        return self._core.decoder

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._core.device)
