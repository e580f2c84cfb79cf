"""From shards to whole Hugging Face tensors: a plan carried out, bucket by bucket.

While a bucket is in use at its destination the next is on its way, so one pipeline stage sends
while another's weights go to the engines. Two ways:

- to one rank, `main`: shards travel from the memory they are in. What lands (`Entry.lands`)
  arrives in its place in the whole tensors; the rest arrives beside them and is copied into place,
  as are main's own shards.
- to every rank: each holder packs its shards into one message for all, from which everyone puts
  them together. More than a bucket is not copied once more: a parameter split by rows, as
  vocabularies are, is whole as it arrives.

Memory beyond the parameters, on a rank that receives: two buckets and the largest parameter at
most. Senders to one rank need none if their shards lie in memory; those that are computed when
they are asked for, as weights with low-rank adapters are, a bucket's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_efr.publication.bucket_plan import Bucket, BucketPlan, Entry
from megatron_efr.weights.mapping import WeightMapping

Shards = Mapping[str, torch.Tensor]


class Parcel(NamedTuple):
    """One bucket's whole tensors by Hugging Face name, empty if they were not wanted.

    `flat`: the bytes [n] of all of them, one after another without gaps, whose views they are; None
    if they lie apart.
    """

    tensors: list[tuple[str, torch.Tensor]]
    flat: torch.Tensor | None


class Reshard:
    """Carries out a plan within `group`, of which `main` is the rank that wants whole tensors if
    not all do.

    All ranks of the group make theirs together.
    """

    def __init__(
        self, plan: BucketPlan, mapping: WeightMapping, group: dist.ProcessGroup, main: int = 0
    ) -> None:
        self.plan = plan
        self._mapping = mapping
        self._group = group
        self._main = main
        self._shapes = mapping.shapes()
        self._rank = dist.get_rank()
        self._member = main in dist.get_process_group_ranks(group)
        self._kept: torch.Tensor | None = None
        # lays shards into host memory; CUDA's copies return at once
        self._hand = ThreadPoolExecutor(1, "weights")
        # its first call must be everybody's, and `_together` is some ranks'
        if dist.get_backend(group) == "nccl":
            dist.all_reduce(torch.zeros(1, device="cuda"), group=group)

    def parcels(
        self, local: Shards, *, flat: bool = False, everywhere: bool = False
    ) -> Iterator[Parcel]:
        """Every bucket in turn; all ranks of the group iterate together.

        `local`: this rank's shards, in memory or computed when they are asked for. `everywhere`:
        every rank of its group gets the tensors, else `main` alone, and the groups without it have
        nothing to do. Without `flat` tensors are views of the shards if nothing is split. A parcel
        is good until the next is asked for.
        """
        if not everywhere and not self._member:
            yield from map(self._names, self.plan.buckets)
            return
        main = None if everywhere else self._main
        memory = self._memory(local, kept=flat and self._rank == main)
        moving: _Transfer | None = None
        for number, bucket in enumerate(self.plan.buckets):
            moving = moving or self._start(bucket, local, main, memory, flat)
            for work in moving.works:
                work.wait()
            wanted = main in (None, self._rank)
            parcel = (
                self._put_together(bucket, moving, local, flat) if wanted else self._names(bucket)
            )
            moving = None  # before the next one's buffers are made
            following = (
                self.plan.buckets[number + 1] if number + 1 < len(self.plan.buckets) else None
            )
            if following is not None and self.plan.overlaps(bucket, following, main):
                moving = self._start(following, local, main, memory, flat)
            yield parcel
            # its memory is room for a later one
            del parcel

    def _memory(self, local: Shards, *, kept: bool) -> _Memory:
        """Host memory is kept from one publication to the next, since it is slow to touch for the
        first time.

        Not CUDA's: its allocator is quick, an engine may still hold a handle, and training needs
        the room.
        """
        device = next(iter(local.values())).device
        if not kept or device.type != "cpu":
            return _Memory(device)
        if self._kept is None:
            self._kept = torch.empty(self.plan.peak(self._main), dtype=torch.uint8)
        return _Memory(device, self._kept)

    def _start(
        self, bucket: Bucket, local: Shards, main: int | None, memory: _Memory, flat: bool
    ) -> _Transfer:
        """Set this rank's part of a bucket going."""
        if main is None:
            return self._broadcast(bucket, local, memory)
        return (
            self._receive(bucket, local, memory, flat)
            if self._rank == main
            else self._send(bucket, local)
        )

    def _names(self, bucket: Bucket) -> Parcel:
        nothing = torch.empty(0)
        return Parcel(
            [(hf, nothing) for entry in bucket.entries for hf in self._mapping.sources(entry.name)],
            None,
        )

    # -- on the way
    # ----------------------------------------------------------------------------------------------

    def _send(self, bucket: Bucket, local: Shards) -> _Transfer:
        """Send this rank's shards to `main`, from the memory they are in."""
        parts: list[torch.Tensor] = []
        for entry in bucket.messages(self._main).get(self._rank, []):
            shard = local[entry.name]
            out = [
                torch.empty(self._shapes[hf], device="meta")
                for hf in self._mapping.sources(entry.name)
            ]
            parts += (
                [part for part, _ in self._places(entry, self._rank, shard, out)]
                if entry.lands
                else [shard]
            )
        return _Transfer(
            _together([dist.P2POp(dist.isend, p, self._main, group=self._group) for p in parts]), {}
        )

    def _receive(self, bucket: Bucket, local: Shards, memory: _Memory, flat: bool) -> _Transfer:
        """The others' shards: what lands into whole tensors, the rest beside them."""
        # whole tensors, and behind them shards that have to be put together first
        raw = memory.take(self.plan.room(bucket, self._main))
        room = self._room(bucket, raw, local if not flat or bucket.is_at(self._main) else None)
        beside = raw[bucket.nbytes :]
        operations = []
        shards = {}
        for holder, entries in bucket.messages(self._main).items():
            for entry in entries:
                # received where it belongs, without a copy; a shard on `meta` tells the places
                if entry.lands:
                    shard = torch.empty(entry.shape, device="meta")
                    targets = [
                        place
                        for _, place in self._places(entry, holder, shard, room.out[entry.name])
                    ]
                else:
                    targets = [_view(beside, entry.shape, entry.dtype)]
                    shards.setdefault(entry.name, {})[holder] = targets[0]
                    beside = beside[entry.shard_bytes :]
                operations += [
                    dist.P2POp(dist.irecv, target, holder, group=self._group) for target in targets
                ]
        # its own shards meanwhile: CUDA's copies return at once, a CPU's take another thread
        works = _together(operations)
        lay = partial(self._lay_own, bucket, local, room)
        if raw.is_cuda:
            lay()
        else:
            works.append(_Laid(self._hand.submit(lay)))
        return _Transfer(works, shards, room)

    def _lay_own(self, bucket: Bucket, local: Shards, room: _Room) -> None:
        """Main's own shards into place, while others' are on their way and the bucket before is in
        use.
        """
        for entry in bucket.entries:
            if entry.lands and entry.name in room.out and self._main in entry.holders:
                for part, place in self._places(
                    entry, self._main, local[entry.name], room.out[entry.name]
                ):
                    place.copy_(part)

    def _broadcast(self, bucket: Bucket, local: Shards, memory: _Memory) -> _Transfer:
        """Everyone's shards to all, one message from each rank."""
        messages = bucket.messages(None)
        sizes = [sum(entry.shard_bytes for entry in entries) for entries in messages.values()]
        slots = dict(zip(messages, memory.take(sum(sizes)).split(sizes), strict=True))
        shards: dict[str, dict[int, torch.Tensor]] = {}
        for rank, entries in messages.items():
            rest = slots[rank]
            for entry in entries:
                shard = shards.setdefault(entry.name, {})[rank] = _view(
                    rest, entry.shape, entry.dtype
                )
                if rank == self._rank:
                    shard.copy_(local[entry.name])
                rest = rest[entry.shard_bytes :]
        works = [
            dist.broadcast(slot, rank, group=self._group, async_op=True)
            for rank, slot in slots.items()
        ]
        return _Transfer(works, shards)

    # -- put together
    # ----------------------------------------------------------------------------------------------

    def _put_together(
        self, bucket: Bucket, arrived: _Transfer, local: Shards, flat: bool
    ) -> Parcel:
        """The whole tensors of what has arrived; `flat` if that is asked, and they fit a bucket or
        came in place.
        """
        room = arrived.room
        if room is None:
            if not flat or bucket.nbytes > self.plan.limit:
                each = [
                    (e.name, [arrived.shards[e.name][rank] for rank in e.holders])
                    for e in bucket.entries
                ]
                return _apart(
                    [
                        pair
                        for name, shards in each
                        for pair in self._mapping.to_hugging_face(name, shards)
                    ]
                )
            room = self._room(
                bucket, _Memory(next(iter(local.values())).device).take(bucket.nbytes)
            )
        for entry in bucket.entries:
            shards = arrived.shards.get(entry.name, {})
            if entry.name in room.out and (shards or not entry.lands):  # the others are in place
                whole = [
                    shards[rank] if rank in shards else local[entry.name] for rank in entry.holders
                ]
                self._mapping.fill(entry.name, whole, room.out[entry.name])
        return room.parcel

    def _room(self, bucket: Bucket, raw: torch.Tensor, views: Shards | None = None) -> _Room:
        """The places of a bucket's whole tensors in `raw`; with `views`, those that main holds
        whole stay there.
        """
        lie = (
            {e: views[e.name] for e in bucket.entries if e.holders == (self._main,)}
            if views is not None
            else {}
        )
        tensors = [
            pair
            for e, view in lie.items()
            for pair in self._mapping.to_hugging_face(e.name, [view])
        ]
        # wide types first: every tensor then begins at a multiple of its own width, without gaps
        order = sorted(
            (e for e in bucket.entries if e not in lie), key=lambda entry: -entry.dtype.itemsize
        )
        out: dict[str, list[torch.Tensor]] = {}
        start = 0
        for entry in order:
            for name in self._mapping.sources(entry.name):
                tensor = _view(raw[start:], self._shapes[name], entry.dtype)
                out.setdefault(entry.name, []).append(tensor)
                tensors.append((name, tensor))
                start += tensor.nbytes
        return _Room(_apart(tensors) if lie else Parcel(tensors, raw[:start]), out)

    def _places(
        self, entry: Entry, holder: int, shard: torch.Tensor, out: list[torch.Tensor]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The parts of a holder's shard beside their places in whole tensors; what a vocabulary's
        padding is not.
        """
        pairs = self._mapping.places(entry.name, shard, entry.holders.index(holder), out)
        assert pairs is not None
        return [(part, place) for part, place in pairs if place.numel()]


class _Room(NamedTuple):
    """A parcel to be filled, and its tensors by the parameter that they come from."""

    parcel: Parcel
    out: dict[str, list[torch.Tensor]]


class _Laid(NamedTuple):
    """Shards that a thread lays into place, as a work that can be waited for."""

    done: Future[None]

    def wait(self) -> None:
        self.done.result()


class _Transfer(NamedTuple):
    """A bucket on its way: its works, the shards that will arrive, and the place of the others."""

    works: Sequence[Any]
    shards: dict[str, dict[int, torch.Tensor]]
    room: _Room | None = None


class _Memory:
    """Bytes for two buckets at a time: from the two ends of what is kept, in turn, or else fresh
    ones.
    """

    def __init__(self, device: torch.device, kept: torch.Tensor | None = None) -> None:
        self._device, self._kept = device, kept
        self._first = False

    def take(self, size: int) -> torch.Tensor:
        if self._kept is None:
            return torch.empty(size, dtype=torch.uint8, device=self._device)
        self._first = not self._first
        return self._kept[:size] if self._first else self._kept[self._kept.numel() - size :]


def _apart(tensors: list[tuple[str, torch.Tensor]]) -> Parcel:
    """A parcel that is flat only if it is one tensor that already is."""
    if len(tensors) == 1 and tensors[0][1].is_contiguous():
        return Parcel(tensors, tensors[0][1].reshape(-1).view(torch.uint8))
    return Parcel(tensors, None)


def _together(operations: list[dist.P2POp]) -> list[Any]:
    return dist.batch_isend_irecv(operations) if operations else []


def _view(raw: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The first bytes of `raw` as a tensor."""
    return raw[: torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(torch.Size(shape))
