"""The embedded engine: continuous batching over our own decoder, in this process, fed by `publish` like any other.

What does not depend on what. A token is a function of its logits and of (request seed, sample, position). Logits of a
row do not depend on the other rows, on the number of slots or on the order of requests: in float32 on CPU, with one
thread, tokens and log-probs are then the same bit for bit whatever shares the batch, which lets a killed run
generate only its unfinished responses again. Tested on x86 with AVX-512 (MKL) at hidden sizes 64 to 256 and up to 820
tokens, in tests/unit/test_local_engine.py. Elsewhere (bfloat16, CUDA, another BLAS) log-probs may differ in the
last bits, and a token only where its uniform falls between two such roundings. Weights published within a response
make what follows depend on when they came.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from megatron_efr.rollout.engine import Decode, no_text
from megatron_efr.rollout.local.decoder import CHUNK, ROWS, Cache, Decoder, round_up
from megatron_efr.rollout.local.sampling import draw, uniforms
from megatron_efr.rollout.local.turn import Turn
from megatron_efr.rollout.requests import check_request, check_sampling
from megatron_efr.types import Finish, Group, Request, Response, Sampling, VersionSpan
from megatron_efr.weights.architecture import Architecture


class LocalEngine:
    """An `Engine` in this process, for small models; `slots` responses are decoded at once.

    `model` is a Hugging Face folder (only config.json is read), the dictionary of a config.json, or an Architecture.
    One cache serves all streams: one that goes on after another was asked reads again what it holds. A thread that
    decodes while another has paused waits for `resume`; decoding in the very thread that paused is an error, since it
    would wait for ever. Misuse raises RuntimeError, a bad request, sampling or tensor ValueError.
    """

    def __init__(
        self,
        model: str | Path | Mapping[str, Any] | Architecture,
        slots: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        decode: Decode = no_text,
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots: {slots} responses at once; at least 1 is needed")
        self.architecture = Architecture.of(model)
        self.slots, self.decode = slots, decode
        self.device, self.dtype = torch.device(device), dtype
        self._decoder: Decoder | None = None
        self._cache: Cache | None = None
        self._version = -1
        self._publications = 0
        self._held_by: _Stream | None = None  # whose rows the cache holds
        self._turn = Turn()
        self._asleep = False
        self._tally = _Tally()

    @property
    def version(self) -> int:
        """Version of the weights being served; -1 before the first publication."""
        return self._version

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> _Stream:
        """Yield each request's whole group as its last response ends, in order of completion.

        Requests are pulled when rows become free for them, at most slots/16 samples ahead, and prefilled together.
        """
        check_sampling(sampling, self.architecture.vocab)
        with self._turn.changing():
            self._check_serving()
            return _Stream(self, requests, sampling)

    def publish(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace all weights by copies of (Hugging Face name, whole tensor) pairs.

        ValueError names a tensor that is unknown, published twice, mis-shaped or missing; the engine then serves
        nothing until a publication succeeds. Unfinished responses go on with the new weights: what they hold is read
        again, and their version spans say where the weights changed.
        """
        with self._turn.changing():
            if self._asleep:
                raise RuntimeError("the engine is asleep: wake() it before publish()")
            self._version = -1
            self._decoder = self._decoder or Decoder(self.architecture, self.device, self.dtype)
            self._decoder.load(weights)
            self._version = version
            self._publications += 1

    def pause(self) -> None:
        """Stop after the token being decoded; unfinished responses are kept."""
        self._turn.pause()

    def resume(self) -> None:
        """Go on after `pause`, or after `sleep`, `wake` and a publication."""
        if self._version < 0:
            raise RuntimeError("the engine has no weights: publish() before resume()")
        self._turn.resume()

    def sleep(self) -> int:
        """Pause, and free weights and cache. Unfinished responses are kept as tokens, and read again afterwards.

        0: it is no server.
        """
        self._turn.pause()
        with self._turn.changing():
            self._decoder = self._cache = None
            self._version = -1
            self._asleep = True
        return 0

    def wake(self) -> None:
        """End `sleep`, still paused; a publication must follow, and then `resume`."""
        with self._turn.changing():
            self._asleep = False

    def health(self) -> dict[str, float]:
        """Since the last call: tokens, seconds spent decoding, tokens per second, mean rows decoded in a step."""
        with self._turn.changing():
            tally, self._tally = self._tally, _Tally()
        return {
            "tokens": float(tally.tokens),
            "seconds": tally.seconds,
            "tokens_per_second": tally.tokens / tally.seconds if tally.seconds else 0.0,
            "mean_active": tally.rows / tally.steps if tally.steps else 0.0,
        }

    def _check_serving(self) -> None:
        if self._asleep:
            raise RuntimeError("the engine is asleep: wake() it and publish() weights first")
        if self._version < 0:
            raise RuntimeError("the engine has no weights: publish() before generate()")

    @contextmanager
    def _decoding(self, stream: _Stream) -> Iterator[_Tally]:
        """The right to decode one token for `stream`: waits or raises while paused."""
        with self._turn.decoding(stream):
            if not stream.closed:
                self._check_serving()
            began = time.perf_counter()
            try:
                yield self._tally
            finally:
                self._tally.seconds += time.perf_counter() - began


@dataclass(slots=True)
class _Tally:
    """What `health` reports."""

    tokens: int = 0
    steps: int = 0
    rows: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class _Open:
    """A request with unfinished responses. Its prompt is prefilled once: every sample starts from `kv`, `logits`."""

    request: Request
    responses: list[Response | None]
    started: int = 0
    finished: int = 0
    kv: torch.Tensor | None = None  # [layers, 2, kv heads, >= prompt, head dim], while samples remain to be started
    logits: torch.Tensor | None = None  # [vocab]


@dataclass(slots=True)
class _Row:
    """Whose response a row of the batch holds, and from which token on which version was drawn."""

    owner: _Open
    sample: int
    spans: list[tuple[int, int]]  # (version, first token)


class _Stream(Iterator[Group]):
    """One call of `generate`: rows 0 .. active-1 of the engine's cache, and what waits for them.

    A row holds prompt and response as `tokens[row, :length]`; the cache holds all but the last of them.
    """

    def __init__(self, engine: LocalEngine, requests: Iterable[Request], sampling: Sampling) -> None:
        self._engine = engine
        self._requests = iter(requests)
        self._sampling = sampling
        self._waiting: deque[_Open] = deque()  # prefilled, with samples to start
        self._done: deque[Group] = deque()
        self.closed = False
        self._publication = engine._publications
        rows = round_up(engine.slots, ROWS)
        self._active = 0
        self._ended: list[int] = []  # active rows whose response has ended
        self._rows: list[_Row | None] = [None] * rows
        self._length = np.ones(rows, dtype=np.int64)
        self._prompt = np.ones(rows, dtype=np.int64)
        self._seed = np.zeros(rows, dtype=np.uint64)
        self._sample = np.zeros(rows, dtype=np.int64)
        self._tokens = np.zeros((rows, 0), dtype=np.int64)
        self._logprobs = np.zeros((rows, 0), dtype=np.float32)
        self._is_stop = np.zeros(engine.architecture.vocab, dtype=bool)
        self._is_stop[list(sampling.stop_ids)] = True

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Group:
        while not self._done:
            with self._engine._decoding(self) as tally:
                if self.closed:
                    raise StopIteration
                self._take_up()
                self._fill()
                if self._active:
                    self._step(tally)
                elif not self._done:
                    raise StopIteration
        return self._done.popleft()

    def close(self) -> None:
        """Drop what is unfinished; a thread that waits in `next` gets StopIteration."""
        with self._engine._turn.changing():
            self.closed = True

    def _step(self, tally: _Tally) -> None:
        """One token for every active row."""
        n, padded = self._active, round_up(self._active, ROWS)
        self._length[n:padded] = 1  # rows that only fill up the batch
        rows = np.arange(padded)
        positions = self._length[:padded] - 1
        last = self._tokens[rows, positions]
        cache = self._reserve(int(positions.max()) + 2)
        keys = [int(positions[first : first + CHUNK].max()) + 1 for first in range(0, padded, CHUNK)]
        logits = self._decoder.step(self._to_device(last), self._to_device(positions), cache, keys)
        tally.steps += 1
        tally.rows += n
        self._append(rows[:n], logits)

    def _append(self, rows: np.ndarray, logits: torch.Tensor) -> None:
        """Draw the next token of `rows` from the first of `logits`; note those whose response ends."""
        sampling, n = self._sampling, len(rows)
        at = self._length[rows]
        drawn = at - self._prompt[rows]
        uniform = self._to_device(uniforms(self._seed[rows], self._sample[rows], drawn))
        device_tokens, device_logprobs = draw(logits[:n], uniform, sampling.temperature, sampling.top_p)
        tokens, logprobs = device_tokens.cpu().numpy(), device_logprobs.cpu().numpy()
        if not np.isfinite(logprobs).all():
            self._engine._cache, self.closed = None, True  # what is not finite is not hidden by a mask
            bad = self._row(int(rows[np.flatnonzero(~np.isfinite(logprobs))[0]]))
            raise RuntimeError(f"prompt {bad.owner.request.prompt.id}: the weights give logits that are not finite")
        self._tokens[rows, at] = tokens
        self._logprobs[rows, at] = logprobs
        self._length[rows] += 1
        self._engine._tally.tokens += n
        stopped = self._is_stop[tokens]
        for i in np.flatnonzero(stopped | (drawn + 1 == sampling.max_new_tokens)):
            self._finish(int(rows[i]), "stop" if stopped[i] else "length")

    def _finish(self, index: int, finish: Finish) -> None:
        """Take the response out of row `index`, and its group when it was the last."""
        row, response = self._row(index), slice(int(self._prompt[index]), int(self._length[index]))
        ends = [start for _, start in row.spans[1:]] + [response.stop - response.start]
        tokens = tuple(self._tokens[index, response].tolist())
        versions = tuple(VersionSpan(v, start, end) for (v, start), end in zip(row.spans, ends, strict=True))
        logprobs, text = self._logprobs[index, response].copy(), self._engine.decode(tokens)
        owner = row.owner
        owner.responses[row.sample] = Response(tokens, logprobs, finish, versions, text)
        owner.finished += 1
        if owner.finished == owner.request.samples:
            responses = tuple(r for r in owner.responses if r is not None)
            self._done.append(Group(owner.request.prompt, responses, owner.request.seed))
        self._ended.append(index)

    def _fill(self) -> None:
        """Take ended responses out of the batch and start waiting samples, until no row is free or nothing waits."""
        while True:
            for index in sorted(self._ended, reverse=True):
                self._close(index)
            self._ended.clear()
            free = self._engine.slots - self._active
            self._pull(free)
            started = [self._start(self._waiting[0]) for _ in range(min(free, self._samples_waiting()))]
            if not started:
                return
            indices, logits = zip(*started, strict=True)
            self._append(np.array(indices), torch.stack(logits))

    def _close(self, hole: int) -> None:
        """Fill row `hole` and drop the last row, so that active rows stay together and long ones come first.

        Each later chunk gives its longest row to the hole in the chunk before it: chunks stay sorted by length, as
        new rows enter at the end and all grow alike, and attention of a chunk runs over little more than it needs.
        """
        for first in range(round_up(hole + 1, CHUNK), self._active, CHUNK):
            longest = first + int(self._length[first : min(first + CHUNK, self._active)].argmax())
            self._move(longest, hole)
            hole = longest
        self._active -= 1
        if hole != self._active:
            self._move(self._active, hole)
        self._rows[self._active] = None

    def _start(self, owner: _Open) -> tuple[int, torch.Tensor]:
        """Give `owner`'s next sample a free row; the row, and the logits for its first token."""
        assert owner.kv is not None
        assert owner.logits is not None
        index = self._active
        self._active += 1
        prompt, logits = owner.request.prompt.tokens, owner.logits
        self._reserve(len(prompt) + 1).write(index, len(prompt), owner.kv)
        self._rows[index] = _Row(owner, owner.started, [(self._engine.version, 0)])
        self._tokens[index, : len(prompt)] = prompt
        self._length[index] = self._prompt[index] = len(prompt)
        self._seed[index], self._sample[index] = owner.request.seed, owner.started
        owner.started += 1
        if owner.started == owner.request.samples:
            owner.kv = owner.logits = None
            self._waiting.popleft()
        return index, logits

    def _pull(self, free: int) -> None:
        """Pull and prefill requests until `free` samples wait; if any must be pulled, slots/16 at least."""
        waiting = self._samples_waiting()
        if waiting < free:
            for request in self._requests:
                check_request(request, self._sampling, self._engine.architecture)
                self._waiting.append(_Open(request, [None] * request.samples))
                waiting += request.samples
                if waiting >= max(free, self._engine.slots // 16):
                    break
        if fresh := [owner for owner in self._waiting if owner.kv is None]:
            self._prefill(fresh)

    def _prefill(self, owners: list[_Open]) -> None:
        prompts = [np.array(owner.request.prompt.tokens, dtype=np.int64) for owner in owners]
        for i, kv, logits in self._decoder.read(prompts):
            owners[i].kv, owners[i].logits = kv, logits

    def _take_up(self) -> None:
        """Rebuild what is not there any more: after a publication, or another stream's turn."""
        if self._publication != self._engine._publications:
            self._prefill(list(self._waiting))
        elif self._engine._held_by is self:
            return
        live = [i for i in range(self._active) if i not in self._ended]
        cache = self._reserve(int(self._length[live].max(initial=1)))
        known = [self._tokens[i, : self._length[i] - 1] for i in live]
        for which, kv, _ in self._decoder.read(known):
            cache.write(live[which], len(known[which]), kv)
        for i in live:
            row, drawn = self._row(i), int(self._length[i] - self._prompt[i])
            if row.spans[-1][0] != self._engine.version:
                row.spans = [span for span in row.spans if span[1] < drawn] + [(self._engine.version, drawn)]
        self._publication, self._engine._held_by = self._engine._publications, self

    def _move(self, source: int, target: int) -> None:
        """Move an active row; its last token is not in the cache yet, so that all but it is copied."""
        length = self._length[source]
        self._reserve(int(length)).move(source, target, int(length) - 1)
        for array in (self._length, self._prompt, self._seed, self._sample):
            array[target] = array[source]
        self._tokens[target, :length] = self._tokens[source, :length]
        self._logprobs[target, :length] = self._logprobs[source, :length]
        self._rows[target] = self._rows[source]

    def _reserve(self, tokens: int) -> Cache:
        """The engine's cache, with room for `tokens` in every row, here and there."""
        engine = self._engine
        if engine._cache is None:
            engine._cache = Cache(engine.architecture, len(self._rows), engine.device, engine.dtype)
        engine._cache.reserve(tokens)
        more = engine._cache.capacity - self._tokens.shape[1]
        if more > 0:
            self._tokens = np.pad(self._tokens, ((0, 0), (0, more)))
            self._logprobs = np.pad(self._logprobs, ((0, 0), (0, more)))
        return engine._cache

    def _samples_waiting(self) -> int:
        return sum(owner.request.samples - owner.started for owner in self._waiting)

    def _row(self, index: int) -> _Row:
        row = self._rows[index]
        assert row is not None
        return row

    @property
    def _decoder(self) -> Decoder:
        assert self._engine._decoder is not None
        return self._engine._decoder

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._engine.device)
