"""Plan of buckets: parameters that travel together, and from which ranks; alike on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_efr.weights.mapping import WeightMapping

BUCKET_BYTES = 512 * 2**20
_ALIGNMENT = 16  # bytes; a shard within a message can then be viewed in its type


@dataclass(frozen=True, slots=True)
class Entry:
    """A Megatron parameter of the whole model: the ranks whose shards make it up, in order, and
    what a shard is.
    """

    name: str
    holders: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    lands: bool
    """Each part of a shard is one run of bytes, there and in the whole tensors: it can arrive in
    its place.
    """

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

    def messages(self, main: int | None) -> dict[int, list[Entry]]:
        """The shards that each rank but `main` hands over, in ascending order of ranks."""
        found: dict[int, list[Entry]] = {}
        for entry in self.entries:
            for holder in entry.holders:
                if holder != main:
                    found.setdefault(holder, []).append(entry)
        return dict(sorted(found.items()))

    def staged(self, main: int) -> int:
        """Bytes that arrive at `main` and are copied into place there."""
        messages = self.messages(main).values()
        return sum(
            entry.shard_bytes for entries in messages for entry in entries if not entry.lands
        )

    def own(self, main: int) -> int:
        """Bytes that `main` holds itself."""
        return sum(
            entry.shard_bytes
            for entry in self.entries
            for holder in entry.holders
            if holder == main
        )

    def is_at(self, main: int | None) -> bool:
        """True if it is one parameter, whole on the rank that wants it."""
        return len(self.entries) == 1 and self.entries[0].holders == (main,)


class Held(NamedTuple):
    """The holdings of one rank: which shard of what is split, and every parameter's (shape of the
    shard, type).
    """

    tensor_rank: int
    shards: Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class BucketPlan:
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
    ) -> BucketPlan:
        """The plan of the ranks `members`, who hold at least one whole model; all ranks of
        `cpu_world` call it.

        `local`: this rank's shards by the mapping's names.
        """
        mine = Held(
            tensor_rank, {name: (tuple(shard.shape), shard.dtype) for name, shard in local.items()}
        )
        everyone: list[Any] = [None] * dist.get_world_size(cpu_world)
        dist.all_gather_object(everyone, mine, group=cpu_world)
        return cls.derive({rank: everyone[rank] for rank in members}, mapping, limit)

    @classmethod
    def derive(
        cls, held: Mapping[int, Held], mapping: WeightMapping, limit: int = BUCKET_BYTES
    ) -> BucketPlan:
        """The plan for what each rank holds. If several hold the same shard, the first sends it."""
        holders: dict[tuple[str, int], int] = {}
        shards: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for rank in sorted(held):
            for name, shard in held[rank].shards.items():
                holders.setdefault((name, held[rank].tensor_rank), rank)
                shards.setdefault(name, shard)
        entries = []
        whole = mapping.shapes()
        for name in mapping.parameters():
            positions = range(mapping.tensor_ranks if mapping.is_sharded(name) else 1)
            missing = [p for p in positions if (name, p) not in holders]
            if missing:
                raise RuntimeError(
                    f"ranks {sorted(held)}: nobody holds tensor-parallel shard {missing[0]} of "
                    f"{name}"
                )
            shape, dtype = shards[name]
            out = [torch.empty(whole[source], device="meta") for source in mapping.sources(name)]
            places = mapping.places(name, torch.empty(shape, device="meta"), 0, out)
            lands = places is not None and all(x.is_contiguous() for pair in places for x in pair)
            entries.append(
                Entry(name, tuple(holders[name, p] for p in positions), shape, dtype, lands)
            )
        return cls(tuple(_divide(entries, limit)), limit)

    @cached_property
    def largest(self) -> int:
        """Bytes of the largest parameter."""
        return max(entry.nbytes for bucket in self.buckets for entry in bucket.entries)

    @property
    def nbytes(self) -> int:
        return sum(bucket.nbytes for bucket in self.buckets)

    def room(self, bucket: Bucket, main: int | None) -> int:
        """Bytes that a bucket takes on a rank that wants it."""
        return bucket.nbytes + (bucket.staged(main) if main is not None else 0)

    def overlaps(self, bucket: Bucket, following: Bucket, main: int | None) -> bool:
        """True if the next bucket may arrive while this one is in use."""
        return self.room(bucket, main) + self.room(following, main) <= 2 * self.limit + self.largest

    def peak(self, main: int) -> int:
        """The most bytes that buckets take at `main` at any time."""
        pairs = [pair for pair in pairwise(self.buckets) if self.overlaps(*pair, main)]
        return max(
            sum(self.room(bucket, main) for bucket in group)
            for group in [*pairs, *zip(self.buckets)]
        )


def _divide(entries: Sequence[Entry], limit: int) -> Iterator[Bucket]:
    bucket: list[Entry] = []
    size = 0
    for entry in entries:
        if bucket and size + entry.nbytes > limit:
            yield Bucket(tuple(bucket))
            bucket = []
            size = 0
        bucket.append(entry)
        size += entry.nbytes
    yield Bucket(tuple(bucket))
