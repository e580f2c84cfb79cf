"""From shards to whole Hugging Face tensors: one plan, the same on every rank, carried out bucket by bucket.

A bucket is a run of Megatron parameters, of at most so many bytes when whole; a parameter larger than that is a bucket
of its own. Every rank that holds a shard sends it at most one message per bucket, straight to where whole tensors are
wanted (one rank, or all of the group). While a bucket is in use at its destination the next is on its way, so one
pipeline stage packs and sends while another's weights go to the engines.

Memory beyond the parameters, on a rank that receives: what arrives (one bucket), what is whole (one bucket), and at
most one parameter in between. A parameter of more than a bucket is not copied into one: where it is split by rows, as
vocabularies are, it is whole as it arrives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_efr.weights.mapping import WeightMapping

BUCKET_BYTES = 512 * 2**20
_ALIGNMENT = 16  # bytes; a shard within a message can then be viewed in its type


@dataclass(frozen=True, slots=True)
class Entry:
    """A Megatron parameter of the whole model: the ranks whose shards make it up, in order, and what a shard is."""

    name: str
    holders: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def shard_bytes(self) -> int:
        size = torch.Size(self.shape).numel() * self.dtype.itemsize
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    @property
    def nbytes(self) -> int:
        """Of the whole parameter."""
        return len(self.holders) * self.shard_bytes


@dataclass(frozen=True)
class Bucket:
    """Parameters that travel together."""

    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    def messages(self, local_to: int | None) -> dict[int, list[Entry]]:
        """What each rank sends, in ascending order of ranks; not what rank `local_to` holds whole and wants itself."""
        found: dict[int, list[Entry]] = {}
        for entry in self.entries:
            for holder in entry.holders if entry.holders != (local_to,) else ():
                found.setdefault(holder, []).append(entry)
        return dict(sorted(found.items()))


class Held(NamedTuple):
    """What one rank holds: which shard of what is split, and every parameter's (shape of the shard, type)."""

    tensor_rank: int
    shards: Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Plan:
    """Every parameter of a model in the mapping's order, divided into buckets of `limit` bytes."""

    buckets: tuple[Bucket, ...]
    limit: int

    @classmethod
    def agreed(
        cls,
        local: Mapping[str, torch.Tensor],
        mapping: WeightMapping,
        tensor_rank: int,
        members: Sequence[int],
        cpu_world: dist.ProcessGroup,
        limit: int = BUCKET_BYTES,
    ) -> Plan:
        """The plan of the ranks `members`, who hold at least one whole model; all ranks of `cpu_world` call it.

        `local`: this rank's shards by the mapping's names.
        """
        mine = Held(tensor_rank, {name: (tuple(shard.shape), shard.dtype) for name, shard in local.items()})
        everyone: list[Any] = [None] * dist.get_world_size(cpu_world)
        dist.all_gather_object(everyone, mine, group=cpu_world)
        return cls.derive({rank: everyone[rank] for rank in members}, mapping, limit)

    @classmethod
    def derive(cls, held: Mapping[int, Held], mapping: WeightMapping, limit: int = BUCKET_BYTES) -> Plan:
        """The plan for what each rank holds. Where several hold the same shard, the first sends it."""
        holders: dict[tuple[str, int], int] = {}
        shards: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for rank in sorted(held):
            for name, shard in held[rank].shards.items():
                holders.setdefault((name, held[rank].tensor_rank), rank)
                shards.setdefault(name, shard)
        entries = []
        for name in mapping.parameters():
            positions = range(mapping.tensor_ranks if mapping.is_sharded(name) else 1)
            missing = [p for p in positions if (name, p) not in holders]
            if missing:
                raise RuntimeError(f"ranks {sorted(held)}: nobody holds tensor-parallel shard {missing[0]} of {name}")
            entries.append(Entry(name, tuple(holders[name, p] for p in positions), *shards[name]))
        return cls(tuple(_divide(entries, limit)), limit)

    @cached_property
    def largest(self) -> int:
        """Bytes of the largest parameter."""
        return max(entry.nbytes for bucket in self.buckets for entry in bucket.entries)

    @property
    def nbytes(self) -> int:
        return sum(bucket.nbytes for bucket in self.buckets)

    def overlaps(self, bucket: Bucket, following: Bucket) -> bool:
        """Whether the next bucket may arrive while this one is in use."""
        return bucket.nbytes + following.nbytes <= 2 * self.limit + self.largest


class Parcel(NamedTuple):
    """One bucket's whole tensors by Hugging Face name, empty where they were not wanted.

    `flat`: the bytes [n] of all of them, one after another without gaps, whose views they are; None where they lie
    apart.
    """

    tensors: list[tuple[str, torch.Tensor]]
    flat: torch.Tensor | None


class Reshard:
    """Carries out a plan within `group`, of which `main` is the rank that wants whole tensors if not all do."""

    def __init__(self, plan: Plan, mapping: WeightMapping, group: dist.ProcessGroup, main: int = 0) -> None:
        self.plan, self._mapping, self._group, self._main = plan, mapping, group, main
        self._shapes = mapping.shapes()
        self._rank = dist.get_rank()
        self._member = main in dist.get_process_group_ranks(group)

    def parcels(
        self, local: Mapping[str, torch.Tensor], *, flat: bool = False, everywhere: bool = False
    ) -> Iterator[Parcel]:
        """Every bucket in turn; all ranks of the group iterate together.

        `local`: this rank's shards. `everywhere`: every rank of its group gets the tensors, else `main` alone, and the
        groups without it have nothing to do. Without `flat` tensors are views of live shards where nothing is split.
        A parcel is good until the next is asked for.
        """
        receives = everywhere or self._rank == self._main
        buckets = self.plan.buckets if everywhere or self._member else ()
        device = next(iter(local.values())).device
        # parcels that are views of what arrived must not see it overwritten, nor an engine that holds a CUDA handle
        reusable = [bucket.nbytes for bucket in buckets if bucket.nbytes <= self.plan.limit]
        memory = _Memory(device, max(reusable, default=0) if flat and device.type == "cpu" else 0)
        moving = self._start(buckets[0], local, everywhere, memory) if buckets else None
        for number, bucket in enumerate(buckets):
            if moving is None:
                moving = self._start(bucket, local, everywhere, memory)
            moving.wait()
            into = memory if flat else None
            parcel = self._assemble(bucket, moving, local, into) if receives else self._names(bucket)
            moving = None  # before the next one's buffers are made
            if number + 1 < len(buckets) and self.plan.overlaps(bucket, buckets[number + 1]):
                moving = self._start(buckets[number + 1], local, everywhere, memory)
            yield parcel
            del parcel
        if not buckets:
            yield from (self._names(bucket) for bucket in self.plan.buckets)

    def _start(self, bucket: Bucket, local: Mapping[str, torch.Tensor], everywhere: bool, memory: _Memory) -> _Transfer:
        """Set this rank's part of a bucket's messages going."""
        messages = bucket.messages(None if everywhere else self._main)
        receives = everywhere or self._rank == self._main
        wanted = {r: m for r, m in messages.items() if receives or r == self._rank}
        sizes = {rank: sum(entry.shard_bytes for entry in entries) for rank, entries in wanted.items()}
        buffer = memory.take("arriving", sum(sizes.values()))
        slots = dict(zip(sizes, buffer.split(list(sizes.values())), strict=True))
        if self._rank in wanted:
            _pack(wanted[self._rank], local, slots[self._rank])
        if everywhere:
            works = [dist.broadcast(slots[r], r, group=self._group, async_op=True) for r in messages]
        else:
            works = self._to_main(slots)
        return _Transfer({r: (entries, slots[r]) for r, entries in wanted.items()}, works)

    def _to_main(self, slots: Mapping[int, torch.Tensor]) -> list[Any]:
        """Messages from rank to rank, all at once."""
        operations = [
            dist.P2POp(dist.irecv, slot, rank, group=self._group)
            if self._rank == self._main
            else dist.P2POp(dist.isend, slot, self._main, group=self._group)
            for rank, slot in slots.items()
            if rank != self._main
        ]
        return dist.batch_isend_irecv(operations) if operations else []

    def _names(self, bucket: Bucket) -> Parcel:
        nothing = torch.empty(0)
        return Parcel([(hf, nothing) for entry in bucket.entries for hf in self._mapping.sources(entry.name)], None)

    def _assemble(
        self, bucket: Bucket, arrived: _Transfer, local: Mapping[str, torch.Tensor], memory: _Memory | None
    ) -> Parcel:
        """The whole tensors of what has arrived, flat where `memory` is given for it."""
        shards = {entry.name: arrived.shards(entry) or [local[entry.name]] for entry in bucket.entries}
        if memory is None or bucket.nbytes > self.plan.limit:
            return _alone([p for name, parts in shards.items() for p in self._mapping.to_hugging_face(name, parts)])
        # wide types first: every tensor then begins at a multiple of its own width, without gaps
        order = sorted(bucket.entries, key=lambda entry: -entry.dtype.itemsize)
        views = {entry.name: self._whole(entry) for entry in order}
        joined = memory.take("whole", sum(size for pairs in views.values() for _, size in pairs))
        tensors, start = [], 0
        for entry in order:
            out = []
            for name, size in views[entry.name]:
                out.append(_view(joined[start:], self._shapes[name], entry.dtype))
                tensors.append((name, out[-1]))
                start += size
            self._mapping.fill(entry.name, shards[entry.name], out)
        return Parcel(tensors, joined)

    def _whole(self, entry: Entry) -> list[tuple[str, int]]:
        """The Hugging Face tensors of a parameter and their bytes, without padding."""
        names = self._mapping.sources(entry.name)
        return [(name, torch.Size(self._shapes[name]).numel() * entry.dtype.itemsize) for name in names]


class _Memory:
    """Buffers of bytes by their use. Those of at most `kept` bytes are used again: fresh memory is slow to touch."""

    def __init__(self, device: torch.device, kept: int) -> None:
        self._device, self._kept = device, kept
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, use: str, size: int) -> torch.Tensor:
        """`size` bytes for `use`, which has no more need of those it took before."""
        if size > self._kept:
            return torch.empty(size, dtype=torch.uint8, device=self._device)
        if use not in self._buffers:
            self._buffers[use] = torch.empty(self._kept, dtype=torch.uint8, device=self._device)
        return self._buffers[use][:size]


class _Transfer:
    """A bucket on its way: the messages that this rank sends or receives, and the works that move them."""

    def __init__(self, messages: Mapping[int, tuple[list[Entry], torch.Tensor]], works: list[Any]) -> None:
        self._works = works
        self._shards: dict[str, dict[int, torch.Tensor]] = {}
        for rank, (entries, message) in messages.items():
            start = 0
            for entry in entries:
                shard = _view(message[start:], entry.shape, entry.dtype)
                self._shards.setdefault(entry.name, {})[rank] = shard
                start += entry.shard_bytes

    def wait(self) -> None:
        for work in self._works:
            work.wait()

    def shards(self, entry: Entry) -> list[torch.Tensor]:
        """The shards of a parameter that came by message, in order."""
        found = self._shards.get(entry.name)
        return [found[rank] for rank in entry.holders] if found else []


def _divide(entries: Sequence[Entry], limit: int) -> Iterator[Bucket]:
    bucket: list[Entry] = []
    size = 0
    for entry in entries:
        if bucket and size + entry.nbytes > limit:
            yield Bucket(tuple(bucket))
            bucket, size = [], 0
        bucket.append(entry)
        size += entry.nbytes
    yield Bucket(tuple(bucket))


def _pack(entries: Sequence[Entry], local: Mapping[str, torch.Tensor], message: torch.Tensor) -> None:
    """Lay this rank's shards one after another."""
    start = 0
    for entry in entries:
        _view(message[start:], entry.shape, entry.dtype).copy_(local[entry.name])
        start += entry.shard_bytes


def _view(raw: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The first bytes of `raw` as a tensor."""
    return raw[: torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(torch.Size(shape))


def _alone(tensors: list[tuple[str, torch.Tensor]]) -> Parcel:
    """A parcel that is flat only where it is one tensor that already is."""
    if len(tensors) == 1 and tensors[0][1].is_contiguous():
        return Parcel(tensors, tensors[0][1].reshape(-1).view(torch.uint8))
    return Parcel(tensors, None)
