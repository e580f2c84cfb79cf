"""Publication: the policy's weights to the engine in rank 0, or to servers: the sequence, failure, and the check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_efr.weights.reshard import Parcel


class EngineError(RuntimeError):
    """An engine refused, failed or did not answer; the message names the server and what it answered."""


class WeightMismatchError(EngineError):
    """An engine does not hold the weights that it was sent. Sending them again would not help: the run must stop."""


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
    def urls(self) -> Sequence[str]:
        """Their addresses."""
        ...

    @property
    def engine_ranks(self) -> int:
        """Tensor-parallel ranks of each server."""
        ...

    def begin_update(self) -> None:
        """Pause (unfinished responses are kept), drop what is cached, open the update session."""
        ...

    def update_from_tensor(self, payloads: list[str], load_format: str | None) -> None:
        """Send one bucket: a base64 payload for each tensor-parallel rank, the same to every server; or, where there
        are as many as all servers have ranks together, each server its own.
        """
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


class Weights(Protocol):
    """A sharded policy, as far as publishing is concerned; every rank has it and calls it alike."""

    def parcels(self, *, flat: bool, everywhere: bool) -> Iterator[Parcel]: ...


class Embedded:
    """Publishes to the engine that lives in rank 0: whole tensors as they come, views where nothing is split."""

    def __init__(self, receiver: Receiver | None) -> None:
        self._receiver = receiver

    def publish(self, weights: Weights, version: int) -> None:
        """Bring `weights` to the engine as `version`; every rank calls it, since a whole tensor takes all."""
        tensors = (pair for parcel in weights.parcels(flat=False, everywhere=False) for pair in parcel.tensors)
        if self._receiver is not None:
            self._receiver.publish(tensors, version)
        else:
            for _ in tensors:
                pass


class Transport(Protocol):
    """How whole tensors reach the engines. Every rank has one; what says so is called on rank 0 alone."""

    everywhere: bool
    """Every rank's parcels are needed, and kept until `deliver` has returned on rank 0."""

    def prepare(self, parcel: Parcel) -> Any:
        """What rank 0 will deliver; every rank calls it."""
        ...

    def begin(self) -> None:
        """Before the first parcel. Rank 0."""
        ...

    def deliver(self, prepared: Any) -> None:
        """Hand one parcel to the engines; EngineError where one refuses. Rank 0."""
        ...

    def finish(self) -> None:
        """After the last parcel: when it returns the engines have them all. Rank 0."""
        ...

    def abandon(self) -> None:
        """Forget what a publication that failed has left. Rank 0."""
        ...


class Check(Protocol):
    """What the engines must say of their weights after a publication."""

    def add(self, parcel: Parcel) -> None: ...

    def compare(self, servers: list[dict[str, str]]) -> None:
        """WeightMismatchError names a tensor that an engine has otherwise, or not at all."""
        ...


ATTEMPTS = 2


class Publisher:
    """Brings a policy's weights to engines; every rank has one and calls it alike, `engines` is rank 0's.

    The sequence: close the session of a publication that failed, here or in a trainer that died; pause, flush, open a
    session; the parcels; close it, flush, name the version, go on. On any failure the engines stay paused and all of it
    is done again, once. After the first publication, and every `verify_every`-th, the engines' checksums are compared
    with the tensors sent.
    """

    def __init__(
        self,
        transport: Transport,
        engines: Engines | None,
        cpu_world: dist.ProcessGroup,
        *,
        check: Callable[[], Check],
        verify_every: int,
    ) -> None:
        self._transport, self._engines, self._cpu_world = transport, engines, cpu_world
        self._check, self._verify_every = check, verify_every
        self._published = 0
        self._clean = False

    def publish(self, weights: Weights, version: int) -> None:
        """Bring `weights` to every engine as `version`.

        EngineError, on every rank, names the engine that failed twice: it must be restarted before the next attempt.
        WeightMismatchError names a tensor that an engine does not have as it was sent.
        """
        check = self._check() if self._published % self._verify_every == 0 else None
        for attempt in range(1, ATTEMPTS + 1):
            failure = self._attempt(weights, version, check)
            if failure is None:
                self._published += 1
                return
            if attempt == ATTEMPTS or isinstance(failure, WeightMismatchError):
                raise failure
            if self._engines is not None:
                print(f"version {version} was not published, and is sent again: {failure}", flush=True)

    def _attempt(self, weights: Weights, version: int, check: Check | None) -> EngineError | None:
        """One publication, all of it; what went wrong, on every rank.

        Ranks that hand over shards cannot know that rank 0 has failed: the parcels run to their end all the same.
        """
        steps = _Steps(self._engines)
        steps.run(self._open)
        for parcel in weights.parcels(flat=True, everywhere=self._transport.everywhere):
            prepared = self._transport.prepare(parcel)
            steps.run(lambda prepared=prepared: self._transport.deliver(prepared))
            if check is not None:
                steps.run(lambda parcel=parcel: check.add(parcel))
            if self._transport.everywhere:
                dist.barrier(self._cpu_world)
            del parcel, prepared
        steps.run(lambda: self._close(version, check))
        outcome: list[Any] = [steps.failure]
        dist.broadcast_object_list(outcome, src=0, group=self._cpu_world)
        return outcome[0]

    def _open(self) -> None:
        assert self._engines is not None
        if not self._clean:
            self._transport.abandon()
            self._engines.abandon_update()
        self._clean = False
        self._engines.begin_update()
        self._transport.begin()

    def _close(self, version: int, check: Check | None) -> None:
        assert self._engines is not None
        self._transport.finish()
        if check is not None:
            check.compare(self._engines.checksums())
        self._engines.end_update(version)
        self._clean = True


class _Steps:
    """What rank 0 does with the engines, up to the first failure."""

    def __init__(self, engines: Engines | None) -> None:
        self._acts = engines is not None
        self.failure: EngineError | None = None

    def run(self, step: Callable[[], None]) -> None:
        if self._acts and self.failure is None:
            try:
                step()
            except EngineError as error:
                self.failure = error
