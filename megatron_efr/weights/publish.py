"""Publication: the policy's whole tensors, streamed by name to the engine that rank 0 holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Protocol

import torch


class EngineError(RuntimeError):
    """An engine refused, failed or did not answer; the message names the server and what it answered."""


class Receiver(Protocol):
    """An engine, as far as publishing is concerned."""

    def publish(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None: ...


class Engines(Protocol):
    """Servers that hold their own weights, as publication sees them; rank 0 has them.

    Every call goes to all servers at once, waits for all, and raises EngineError where one fails. Between
    `begin_update` and `end_update` no server serves; after a failure they stay paused, and an update begins again
    with `abandon_update`.
    """

    @property
    def count(self) -> int:
        """How many servers there are."""
        ...

    @property
    def engine_ranks(self) -> int:
        """Tensor-parallel ranks of each server."""
        ...

    def begin_update(self) -> None:
        """Pause (unfinished responses are kept), drop what is cached, open the update session."""
        ...

    def update_from_tensor(self, payloads: list[str], load_format: str | None) -> None:
        """Send one bucket: a base64 payload for each tensor-parallel rank, the same to every server."""
        ...

    def join_group(self, address: str, port: int, name: str, backend: str) -> Future[None]:
        """Have every server enter a process group in which the trainer is rank 0; returns at once.

        Rank r of server i is rank 1 + i * engine_ranks + r of 1 + count * engine_ranks.
        """
        ...

    def update_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group: str,
        load_format: str | None,
    ) -> Future[None]:
        """Have every server receive tensors that rank 0 of `group` broadcasts in this order; returns at once."""
        ...

    def leave_group(self, name: str) -> None:
        """End the process group."""
        ...

    def update_from_disk(self, path: str) -> None:
        """Have every server read a model folder."""
        ...

    def end_update(self, version: int) -> None:
        """Close the session, drop what is cached, name the weights `version`, go on serving, check the version."""
        ...

    def abandon_update(self) -> None:
        """Close the session of an update that failed, if one is open; the servers stay paused."""
        ...

    def checksums(self) -> list[dict[str, str]]:
        """What each server says of its weights, by SGLang's own parameter names."""
        ...


def publish(weights: Iterable[tuple[str, torch.Tensor]], version: int, receiver: Receiver | None) -> None:
    """Send `weights` as `version`. Every rank calls it, since a whole tensor takes all; rank 0 has the receiver."""
    if receiver is not None:
        receiver.publish(weights, version)
    else:
        for _ in weights:
            pass
