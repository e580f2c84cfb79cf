"""The protocol every rollout engine keeps: groups stream out as they finish, weights stream in by
name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Protocol, Self

import torch

from megatron_efr.types import Group, Request, Sampling

ABILITIES = {
    "forks": "answers from the middle of a response",
    "penalties": (
        "penalises tokens as it draws them for a run, and gives log-probs that are the sampler's"
    ),
    "routing": "says which experts a mixture chose",
    "seeds": "draws the same tokens again for a request's seed",
}
"""Abilities that an engine may have beyond those of all, by name."""


class GroupStream(Protocol):
    """Finished groups of one `generate`, in order of completion. One thread at a time asks it.

    Requests that are an iterator may grow: one that has run dry is asked again at every `next`, so
    a stream that has ended goes on once there is more.
    """

    def __iter__(self) -> Self: ...

    def __next__(self) -> Group: ...

    def close(self) -> None:
        """Drop what is unfinished; a thread that waits in `next` gets StopIteration."""
        ...


class Engine(Protocol):
    """Answers requests with the weights of one version, in tokens and, by the tokenizer it was made
    with, in text.

    One thread at a time asks for groups; another may call everything else while it does. Several
    streams may be alive: what an earlier one has not finished waits, and goes on when that stream
    is asked again.

    An engine serves nothing before its first `publish`, and nothing after one that failed (version
    -1). `pause` stops decoding after the current token and keeps what is unfinished; `resume` goes
    on, if there are weights. `sleep` pauses and gives up weights and caches: `wake` takes memory
    for weights, `publish` fills it, and `resume` takes the caches' and goes on; nothing is served
    before. Misuse raises RuntimeError, bad input ValueError.
    """

    abilities: ClassVar[frozenset[str]]
    """The ABILITIES that engines of this class have."""

    @property
    def version(self) -> int:
        """Version of the weights being served; -1 before the first publication."""
        ...

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> GroupStream:
        """Yield each request's whole group as soon as its last response ends, in order of
        completion.

        A `Driver` has each response made by its script; at most `sampling.max_new_tokens` tokens
        are drawn for it.
        """
        ...

    def publish(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace all weights by a snapshot of (Hugging Face name, whole tensor) pairs.

        Unfinished responses go on with the new weights, and their version spans say from which
        token on. A name that is unknown, missing or given twice, or a shape that is not the
        model's, is an error.
        """
        ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def sleep(self) -> int:
        """Give up weights and caches; returns the number of servers that did."""
        ...

    def wake(self) -> None: ...

    def health(self) -> dict[str, float]:
        """Figures since the last call: `tokens` generated, `seconds` spent on them, and what else
        is known.
        """
        ...
