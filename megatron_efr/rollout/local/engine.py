"""The embedded engine: continuous batching over our own decoder, in this process, fed by `publish`
like any other.

What does not depend on what. A token is a function of its logits and of (request seed, sample,
position in the response); what a script writes takes a position too, and goes through the same step
as what is drawn. Logits of a row do not depend on the other rows, on the number of slots or on the
order of requests: in float32 on CPU, with one thread, tokens and log-probs are then the same bit
for bit whatever shares the batch, which lets a killed run generate only its unfinished responses
again. Tested on x86 at hidden sizes 64 to 256 (AVX-512, AVX2) and 320 to 576 (AVX2), up to 820
tokens, in tests/unit/rollout/test_local_engine.py. Elsewhere (bfloat16, CUDA, another BLAS)
log-probs may differ in the last bits, and a token only if its uniform falls between two such
roundings. Weights published within a response make what follows depend on when they came.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from megatron_efr.rollout.checks import check_sampling
from megatron_efr.rollout.codec import Codec, NoText
from megatron_efr.rollout.local.core import Core, Tally
from megatron_efr.rollout.local.decoder import Decoder
from megatron_efr.rollout.local.stream import Stream
from megatron_efr.types import Request, Sampling
from megatron_efr.weights.architecture import Architecture


class LocalEngine:
    """An `Engine` in this process, for small models; `slots` responses are decoded at once.

    `model` is a Hugging Face folder (only config.json is read), the dictionary of a config.json, or
    an Architecture. One cache serves all streams: one that goes on after another was asked reads
    again what it holds. A thread that decodes while another has paused waits for `resume`; decoding
    in the very thread that paused is an error, since it would wait for ever. Misuse raises
    RuntimeError, a bad request, sampling or tensor ValueError.
    """

    abilities: ClassVar[frozenset[str]] = frozenset({"forks", "penalties", "seeds"})

    def __init__(
        self,
        model: str | Path | Mapping[str, Any] | Architecture,
        slots: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        codec: Codec | None = None,
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots: {slots} responses at once; at least 1 is needed")
        self.architecture = Architecture.of(model)
        self._core = Core(self.architecture, slots, torch.device(device), dtype, codec or NoText())

    @property
    def version(self) -> int:
        """Version of the weights being served; -1 before the first publication."""
        return self._core.version

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Stream:
        """Yield each request's whole group as its last response ends, in order of completion.

        Requests are pulled when rows become free for them, at most slots/16 samples ahead, and
        prefilled together.
        """
        check_sampling(sampling, self.architecture.vocab)
        with self._core.pause_lock.changing():
            self._core.check_serving()
            return Stream(self._core, requests, sampling)

    def publish(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace all weights by copies of (Hugging Face name, whole tensor) pairs.

        ValueError names a tensor that is unknown, published twice, mis-shaped or missing; the
        engine then serves nothing until a publication succeeds. Unfinished responses go on with the
        new weights: what they hold is read again, and their version spans name the tokens at which
        the weights changed.
        """
        with self._core.pause_lock.changing():
            if self._core.asleep:
                raise RuntimeError("the engine is asleep: wake() it before publish()")
            core = self._core
            core.version = -1
            core.decoder = core.decoder or Decoder(core.architecture, core.device, core.dtype)
            core.decoder.load(weights)
            core.version = version
            core.publications += 1

    def pause(self) -> None:
        """Stop after the token being decoded; unfinished responses are kept."""
        self._core.pause_lock.pause()

    def resume(self) -> None:
        """Go on after `pause`, or after `sleep`, `wake` and a publication."""
        if self._core.version < 0:
            raise RuntimeError("the engine has no weights: publish() before resume()")
        self._core.pause_lock.resume()

    def sleep(self) -> int:
        """Pause, and free weights and cache. Unfinished responses are kept as tokens, and read
        again afterwards.

        0: it is no server.
        """
        self._core.pause_lock.pause()
        with self._core.pause_lock.changing():
            self._core.decoder = self._core.cache = None
            self._core.version = -1
            self._core.asleep = True
        return 0

    def wake(self) -> None:
        """End `sleep`, still paused; a publication must follow, and then `resume`."""
        with self._core.pause_lock.changing():
            self._core.asleep = False

    def health(self) -> dict[str, float]:
        """Since the last call: tokens, seconds spent decoding, tokens per second, mean rows decoded
        in a step.
        """
        with self._core.pause_lock.changing():
            tally = self._core.tally
            self._core.tally = Tally()
        return {
            "tokens": float(tally.tokens),
            "seconds": tally.seconds,
            "tokens_per_second": tally.tokens / tally.seconds if tally.seconds else 0.0,
            "mean_active": tally.rows / tally.steps if tally.steps else 0.0,
        }
