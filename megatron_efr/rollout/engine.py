"""The protocol every rollout engine keeps: groups stream out as they finish, weights stream in by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from megatron_efr.types import Group, Request, Sampling


class Engine(Protocol):
    """Answers requests with the weights of one version. One thread calls it at a time.

    An engine serves nothing before its first `publish`, and nothing after one that failed (version -1). `pause` stops
    decoding after the current token and keeps what is unfinished; `resume` goes on. `sleep` gives up weights and
    caches, so `wake` must be followed by `publish`. Misuse raises RuntimeError, bad input ValueError.
    """

    @property
    def version(self) -> int:
        """Version of the weights being served; -1 before the first publication."""
        ...

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Group]:
        """Yield each request's whole group as soon as its last response ends, in order of completion.

        A later `generate` ends an earlier one.
        """
        ...

    def publish(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace all weights by a snapshot of (Hugging Face name, whole tensor) pairs.

        A name that is unknown, missing or given twice, or a shape that is not the model's, is an error.
        """
        ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def health(self) -> dict[str, float]:
        """Figures since the last call: `tokens` generated, `seconds` spent on them, and what else is known."""
        ...
