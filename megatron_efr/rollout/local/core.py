"""The core that all streams of an embedded engine share: model, weights, cache, and whose turn it
is to use them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from megatron_efr.rollout.codec import Codec
from megatron_efr.rollout.local.decoder import Cache, Decoder
from megatron_efr.rollout.local.pause import Closable, PauseLock
from megatron_efr.weights.architecture import Architecture


@dataclass(slots=True)
class Tally:
    """The figures of an engine's `health`."""

    tokens: int = 0
    steps: int = 0
    rows: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Core:
    """The state of an engine: `slots` responses are decoded at once, from weights of `version` (-1:
    none).
    """

    architecture: Architecture
    slots: int
    device: torch.device
    dtype: torch.dtype
    codec: Codec
    decoder: Decoder | None = None
    cache: Cache | None = None
    held_by: Closable | None = None  # the stream whose rows the cache holds
    version: int = -1
    publications: int = 0
    asleep: bool = False
    pause_lock: PauseLock = field(default_factory=PauseLock)
    tally: Tally = field(default_factory=Tally)

    def check_serving(self) -> None:
        """RuntimeError unless there are weights."""
        if self.asleep:
            raise RuntimeError("the engine is asleep: wake() it and publish() weights first")
        if self.version < 0:
            raise RuntimeError("the engine has no weights: publish() before generate()")

    @contextmanager
    def decoding(self, stream: Closable) -> Iterator[Tally]:
        """The right to decode one token for `stream`: waits or raises while paused."""
        with self.pause_lock.decoding(stream):
            if not stream.closed:
                self.check_serving()
            began = time.perf_counter()
            try:
                yield self.tally
            finally:
                self.tally.seconds += time.perf_counter() - began
