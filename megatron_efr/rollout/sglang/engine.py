"""The SGLang engine: servers of their own, spoken to from one background thread, behind the
protocol of `Engine`.

Unlike the embedded engine's, its random numbers are the servers', so a request's seed names it and
no more.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import ClassVar, Self

import torch

from megatron_efr.config import TimeoutsConfig
from megatron_efr.publication.named_tensors import check_names
from megatron_efr.publication.reshard import Parcel
from megatron_efr.publication.transports import encode
from megatron_efr.rollout.checks import check_request, check_sampling
from megatron_efr.rollout.codec import Codec, NoText, with_text
from megatron_efr.rollout.servers.process import ServerProcess
from megatron_efr.rollout.sglang.server import WEIGHTS, Server
from megatron_efr.rollout.sglang.server_check import check_server
from megatron_efr.rollout.sglang.weight_updates import ServerUpdates
from megatron_efr.types import Group, Request, Sampling
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.mapping import WeightMapping

AHEAD = 1.25
"""Responses asked for at once, over those that the servers decode at once: what starts as soon as a
place is free.
"""


class SGLangEngine(ServerUpdates):
    """An `Engine` over running servers, each of `engine_ranks` tensor-parallel ranks and `slots`
    places, that compute in the policy's `dtype`; UserError if one was started otherwise.

    With `penalties`, scripts may penalise tokens: for evaluations.

    With `routed_experts`, responses of a mixture of experts say which of them read their tokens.
    After a publication in mid-generation these are the new weights' choice for the whole response,
    since its tokens are read again.

    All streams are answered at the same time. A thread that waits for a group while another has
    paused or publishes waits until that is over; waiting in the very thread that paused is an
    error, since it would wait for ever. Misuse raises RuntimeError, a bad request, sampling or
    tensor ValueError, a server EngineError.
    """

    abilities: ClassVar[frozenset[str]] = frozenset({"forks", "routing"})

    def __init__(
        self,
        urls: Sequence[str],
        architecture: Architecture,
        slots: int,
        limits: TimeoutsConfig,
        *,
        key: str | None = None,
        engine_ranks: int = 1,
        bucket_bytes: int = 2**29,
        dtype: str = "float32",
        routed_experts: bool = False,
        penalties: bool = False,
        router: tuple[ServerProcess, int] | None = None,
        codec: Codec | None = None,
    ) -> None:
        super().__init__(
            urls, limits, key, engine_ranks, architecture if routed_experts else None, router
        )
        self.architecture, self.bucket_bytes = architecture, bucket_bytes
        # more responses in flight than slots, so that no slot waits
        self.in_flight = max(1, int(AHEAD * slots * self.count))
        self._shapes = WeightMapping(architecture).shapes()
        self._codec = codec or NoText()
        self._penalties = penalties
        self._streams: list[_Stream] = []
        # refuse servers that were started otherwise, before anything is asked of them
        try:
            for server, info in zip(self._fleet.servers, self._all(Server.info), strict=True):
                check_server(
                    server.url, info, ranks=engine_ranks, dtype=dtype,
                    routed_experts=routed_experts,
                    penalties=penalties,
                )  # fmt: skip
        except BaseException:
            self.close()
            raise

    # -- Engine
    # ----------------------------------------------------------------------------------------------

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> _Stream:
        """Yield each request's whole group as its last response ends, in order of completion.

        Requests are pulled while fewer than `in_flight` responses are asked for.
        """
        check_sampling(sampling, self.architecture.vocab)
        self._check_serving()
        stream = _Stream(self, requests, sampling)
        self._streams = [other for other in self._streams if other.asked] + [stream]
        return stream

    def publish(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace all weights by (Hugging Face name, whole tensor) pairs, in buckets within the
        requests.

        ValueError names a tensor that is unknown, given twice, mis-shaped or missing, before it, or
        the last bucket, is sent. After an error the servers stay paused and serve nothing until a
        publication succeeds.
        """
        self.begin_update()
        for bucket in _buckets(check_names(weights, self._shapes), self.bucket_bytes):
            payload, load_format = encode(Parcel(bucket, None))
            self.update_from_tensor([payload] * self.engine_ranks, load_format)
        self.end_update(version)

    def publish_folder(self, folder: Path, version: int) -> None:
        """Replace all weights by those of a Hugging Face folder, which the servers read; after an
        error as `publish`.

        SGLang ignores what is not the model's: the folder's tensors must have been checked.
        """
        self.begin_update()
        self.update_from_disk(str(folder))
        self.end_update(version)

    def pause(self) -> None:
        """Stop decoding; unfinished responses are kept."""
        self._answering(Server.pause)
        self._paused_by = threading.get_ident()

    def resume(self) -> None:
        """Go on after `pause`, or after `sleep`, `wake` and a publication: with caches again."""
        if self._version < 0:
            raise RuntimeError("the engine has no weights: publish() before resume()")
        self._paused_by = None
        self._answering(Server.resume)

    def sleep(self) -> int:
        """Pause, and give up weights and caches; unfinished responses are kept as tokens. How many
        servers did so.

        Servers that were lost and are back do so too: they hold memory, though they have not been
        published to.
        """
        self._version = -1
        self._thread.run(self._membership.look())
        self.pause()
        self._answering(Server.flush)
        released = self._answering(Server.release_memory)
        self._asleep = True
        return sum(released)

    def wake(self) -> None:
        """Take the weights' memory again, still paused; a publication must follow, and then
        `resume`.
        """
        self._answering(lambda server: server.resume_memory(WEIGHTS))
        self._asleep = False

    def health(self) -> dict[str, float]:
        """Since the last call: tokens generated, seconds in which any was, the share of prompts
        found in caches, responses that were asked for again, servers lost and back; and how many
        serve now, and how many would after a publication.
        """
        tally = self._thread.run(self._fleet.read_tally())
        return {
            "tokens": float(tally.tokens),
            "seconds": tally.seconds,
            "tokens_per_second": tally.tokens / tally.seconds if tally.seconds else 0.0,
            "cached_share": tally.cached_tokens / tally.prompt_tokens
            if tally.prompt_tokens
            else 0.0,
            "serving": float(tally.serving),
            "empty": float(tally.empty),
            "lost": float(tally.lost),
            "back": float(tally.back),
            "resent": float(tally.resent),
        }

    def close(self) -> None:
        """End what is in flight, and the connections; the servers go on."""
        for stream in self._streams:
            stream.close()
        self._thread.run(self._fleet.close())
        self._thread.close()

    # -- within
    # ----------------------------------------------------------------------------------------------

    def _ask(self, request: Request, sampling: Sampling) -> Future[Group]:
        return self._thread.start(self._fleet.group(request, sampling, self._codec))

    def _withdraw(self, asked: Iterable[Future[Group]]) -> None:
        """Cancel requests of a stream that ends. Servers see their connections close; with no other
        stream, at once.
        """
        cancelled = sum(future.cancel() for future in asked)
        if cancelled and not any(stream.asked for stream in self._streams):
            self._answering(Server.abort_all)

    def _check_serving(self) -> None:
        if self._updated_by not in (None, threading.get_ident()):
            return  # another thread's update will be over, or begin again, or the run will end
        if self._asleep:
            raise RuntimeError("the engine is asleep: wake() it and publish() weights first")
        if self._version < 0:
            raise RuntimeError("the engine has no weights: publish() before generate()")


class _Stream(Iterator[Group]):
    """One call of `generate`: groups that are asked for, and those that came back."""

    def __init__(
        self, engine: SGLangEngine, requests: Iterable[Request], sampling: Sampling
    ) -> None:
        self._engine = engine
        self._requests = iter(requests)
        self._sampling = sampling
        self.asked: dict[Future[Group], int] = {}  # and how many responses each is of
        self._done: queue.SimpleQueue[Future[Group] | None] = queue.SimpleQueue()  # None: closed
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Group:
        engine = self._engine
        if self._closed:
            raise StopIteration
        engine._check_serving()
        self._ask()
        if not self.asked:
            raise StopIteration
        if engine._paused_by == threading.get_ident() and self._done.empty():
            raise RuntimeError("the engine is paused: resume() before asking for more groups")
        future = self._done.get()
        if future is None or self._closed:
            raise StopIteration
        del self.asked[future]
        try:
            group = future.result()
        except BaseException:
            self.close()
            raise
        # here, in the thread that waits for the group: the thread of all connections must not be
        # held up
        return with_text(group, engine._codec)

    def close(self) -> None:
        """Drop what is unfinished; a thread that waits in `next` gets StopIteration."""
        self._closed = True
        self._done.put(None)
        asked = self.asked
        self.asked = {}
        self._engine._withdraw(asked)

    def _ask(self) -> None:
        """Pull and send requests while few enough responses are asked for."""
        while sum(self.asked.values()) < self._engine.in_flight:
            request = next(self._requests, None)
            if request is None:
                return
            check_request(request, self._sampling, self._engine.architecture, self._engine._codec)
            if not self._engine._penalties and any(script.penalised for script in request.scripts):
                raise ValueError(
                    f"prompt {request.prompt.id}: these servers take no penalty on tokens"
                )
            future = self._engine._ask(request, self._sampling)
            self.asked[future] = request.samples
            future.add_done_callback(self._done.put)


def _buckets(
    weights: Iterable[tuple[str, torch.Tensor]], size: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Tensors in their order, in lists of at most `size` bytes (or one tensor), given when the next
    list is begun.
    """
    bucket = []
    held = 0
    for name, tensor in weights:
        if bucket and held + tensor.nbytes > size:
            yield bucket
            bucket = []
            held = 0
        bucket.append((name, tensor.detach().cpu()))
        held += tensor.nbytes
    yield bucket
