"""Publication: the policy's weights to the engine in rank 0, or to servers: the sequence, failure,
and the check.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_efr import log
from megatron_efr.errors import EngineError, WeightMismatchError
from megatron_efr.publication.reshard import Parcel


class Receiver(Protocol):
    """An engine, as far as publishing is concerned."""

    def publish(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None: ...


class Engines(Protocol):
    """Servers that hold their own weights, as publication sees them; rank 0 has them.

    Every call goes at once to all servers that take part, waits for all, and raises EngineError if
    one fails. Between `begin_update` and `end_update` no server serves; after a failure they stay
    paused until an update, which begins again with `begin_update`, has ended. What is said of
    servers is said of those that take part.
    """

    @property
    def count(self) -> int:
        """Number of servers."""
        ...

    @property
    def urls(self) -> Sequence[str]:
        """Their addresses."""
        ...

    @property
    def taking_part(self) -> Sequence[bool]:
        """Of all servers, whether each takes part."""
        ...

    @property
    def changed(self) -> bool:
        """True if other servers take part than in the last update, or one that was lost since."""
        ...

    @property
    def engine_ranks(self) -> int:
        """Tensor-parallel ranks of each server."""
        ...

    def begin_update(self) -> None:
        """Decide which servers take part: those that answer, without one that has just failed if
        there are others. Pause them (unfinished responses are kept), drop what is cached, open the
        update session, if need be after closing one that is open. If no server answers, wait for
        one.
        """
        ...

    def update_from_tensor(self, payloads: list[str], load_format: str | None) -> None:
        """Send one bucket: a base64 payload for each tensor-parallel rank, the same to every
        server; or, if there are as many as all servers have ranks together, those that take no part
        included, each server its own.
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
        """Have every server receive tensors that rank 0 of `group` broadcasts in this order;
        returns at once.
        """
        ...

    def leave_group(self, name: str) -> Future[None]:
        """Have those servers leave the process group that are in it; returns at once."""
        ...

    def update_from_disk(self, path: str) -> None:
        """Have every server read a model folder."""
        ...

    def end_update(self, version: int) -> None:
        """Close the session, drop what is cached, name the weights `version`, go on serving, check
        the version.
        """
        ...

    def checksums(self) -> list[dict[str, str]]:
        """Each server's checksums of its weights, by SGLang's own parameter names."""
        ...

    def take_failing(self) -> list[str]:
        """Addresses of servers that have failed twice in a row, and ought to be started again; each
        is told once.
        """
        ...


class Weights(Protocol):
    """A sharded policy, as far as publishing is concerned; every rank has it and calls it alike."""

    def parcels(self, *, flat: bool, everywhere: bool) -> Iterator[Parcel]: ...


class Embedded:
    """Publishes to the engine that lives in rank 0: whole tensors as they come, views if nothing is
    split.
    """

    def __init__(self, receiver: Receiver | None) -> None:
        self._receiver = receiver

    def publish(self, weights: Weights, version: int) -> None:
        """Bring `weights` to the engine as `version`; every rank calls it, since a whole tensor
        takes all.
        """
        tensors = (
            pair
            for parcel in weights.parcels(flat=False, everywhere=False)
            for pair in parcel.tensors
        )
        if self._receiver is not None:
            self._receiver.publish(tensors, version)
            log.event("published", f"version {version}", logging.DEBUG)
        else:
            for _ in tensors:
                pass


class Transport(Protocol):
    """Carries whole tensors to the engines. Every rank has one; some methods are rank 0's alone."""

    everywhere: bool
    """Every rank's parcels are needed, and kept until `deliver` has returned on rank 0."""

    def prepare(self, parcel: Parcel) -> Any:
        """The bytes that rank 0 will deliver; every rank calls it."""
        ...

    def begin(self) -> None:
        """Before the first parcel, when it is known which engines take part. Rank 0."""
        ...

    def deliver(self, prepared: Any) -> None:
        """Hand one parcel to the engines; EngineError if one refuses. Rank 0."""
        ...

    def finish(self) -> None:
        """After the last parcel: when it returns the engines have them all. Rank 0."""
        ...

    def abandon(self) -> None:
        """Forget what a publication that failed has left. Rank 0."""
        ...


class Check(Protocol):
    """A check of what the engines say of their weights after a publication."""

    def add(self, parcel: Parcel) -> None: ...

    def compare(self, servers: list[dict[str, str]]) -> None:
        """WeightMismatchError names a tensor that an engine has otherwise, or not at all."""
        ...


ATTEMPTS = 3


class Publisher:
    """Brings a policy's weights to engines; every rank has one and calls it alike, `engines` is
    rank 0's.

    The sequence: pause, flush, open a session with every engine that answers; the parcels; close
    it, flush, name the version, go on. On any failure the engines stay paused and all of it is done
    again, without the engine that failed if there are others. One that failed twice in a row is
    given to `restart`, on every rank: whose process started it starts it again. Every
    `verify_every`-th publication, the first among them, and each that takes in an engine which took
    no part in the last, is checked: the engines' checksums are compared with the tensors sent.
    """

    def __init__(
        self,
        transport: Transport,
        engines: Engines | None,
        cpu_world: dist.ProcessGroup,
        *,
        check: Callable[[], Check],
        verify_every: int,
        restart: Callable[[Sequence[str]], None] = lambda urls: None,
    ) -> None:
        self._transport = transport
        self._engines = engines
        self._cpu_world = cpu_world
        self._make_check = check
        self._verify_every = verify_every
        self._restart = restart
        self._check: Check | None = None  # rank 0's, of the publication that is going on
        self._published = 0
        self._clean = False

    def publish(self, weights: Weights, version: int) -> None:
        """Bring `weights` to every engine that answers as `version`.

        EngineError, on every rank, has what went wrong the third time, and names the engine.
        WeightMismatchError names a tensor that an engine does not have as it was sent.
        """
        for attempt in range(1, ATTEMPTS + 1):
            failure = self._attempt(weights, version)
            if failure is None:
                self._published += 1
                if self._engines is not None:
                    log.event("published", f"version {version}", logging.DEBUG)
                return
            if attempt == ATTEMPTS or isinstance(failure, WeightMismatchError):
                raise failure
            if self._engines is not None:
                log.warning(f"version {version} was not published, and is sent again: {failure}")
            self._restart_failing()

    def _attempt(self, weights: Weights, version: int) -> EngineError | None:
        """One publication, all of it; what went wrong, on every rank.

        The others wait until rank 0 knows which engines take part: it may wait for one to come
        back, for longer than a collective of theirs waits for rank 0. From then on, ranks that hand
        over shards cannot know that rank 0 has failed: the parcels run to their end all the same.
        """
        # open the session; all ranks must know whether it is open before they send anything
        steps = _Steps(self._engines)
        steps.run(self._open)
        if (failure := self._shared(steps.failure)) is not None:
            return failure
        # bucket by bucket: whole tensors to rank 0, or wherever the transport wants them
        for parcel in weights.parcels(flat=True, everywhere=self._transport.everywhere):
            prepared = self._transport.prepare(parcel)
            steps.run(lambda prepared=prepared: self._transport.deliver(prepared))
            if (check := self._check) is not None:
                steps.run(lambda parcel=parcel, check=check: check.add(parcel))
            # memory that an engine still reads must not be given back
            if self._transport.everywhere:
                dist.barrier(self._cpu_world)
            del parcel, prepared
        # close it, and tell every rank what went wrong, if anything did
        steps.run(lambda: self._close(version))
        return self._shared(steps.failure)

    def _restart_failing(self) -> None:
        """The engines that failed twice have ended when this returns, if anybody here can start
        them again.
        """
        failing: list[Any] = [self._engines.take_failing() if self._engines is not None else None]
        dist.broadcast_object_list(failing, src=0, group=self._cpu_world)
        if failing[0]:
            self._restart(failing[0])
            dist.barrier(self._cpu_world)

    def _shared(self, failure: EngineError | None) -> EngineError | None:
        """Rank 0's, on every rank."""
        outcome: list[Any] = [failure]
        dist.broadcast_object_list(outcome, src=0, group=self._cpu_world)
        return outcome[0]

    def _open(self) -> None:
        assert self._engines is not None
        # the last publication failed half way
        if not self._clean:
            self._transport.abandon()
        self._clean = False
        # from here on it is known which servers take part
        self._engines.begin_update()
        # checksums now and then, and whenever other servers take part than before
        checked = self._published % self._verify_every == 0 or self._engines.changed
        self._check = self._make_check() if checked else None
        self._transport.begin()

    def _close(self, version: int) -> None:
        assert self._engines is not None
        self._transport.finish()
        # compare before the servers serve: a wrong tensor must not be asked anything
        if self._check is not None:
            self._check.compare(self._engines.checksums())
        self._engines.end_update(version)
        self._clean = True


class _Steps:
    """The steps that rank 0 takes with the engines, up to the first failure."""

    def __init__(self, engines: Engines | None) -> None:
        self._acts = engines is not None
        self.failure: EngineError | None = None

    def run(self, step: Callable[[], None]) -> None:
        if self._acts and self.failure is None:
            try:
                step()
            except EngineError as error:
                self.failure = error
