"""Time of a publication: a model of the plan, whose inputs are bandwidths."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from megatron_efr.publication.bucket_plan import Bucket, BucketPlan


@dataclass(frozen=True)
class Bandwidths:
    """Bytes per second of one rank that receives and hands on, and what the engines' answers
    cost.
    """

    arrive: float  # from the ranks that hold shards
    copy: float  # read here and written there: a shard laid into its place
    send: float  # to the engines
    bucket_s: float = 0.0  # seconds of each bucket's call and answer
    # how much of arriving hides behind sending: less if both need the same processors
    overlap: float = 1.0

    @property
    def values(self) -> tuple[float, ...]:
        return self.arrive, self.copy, self.send, self.bucket_s, self.overlap

    def bare(self) -> Bandwidths:
        """The same links, if nothing is packed, put together or answered."""
        return replace(self, copy=math.inf, bucket_s=0.0)


def seconds(plan: BucketPlan, rates: Bandwidths, main: int | None = 0) -> float:
    """Seconds until the engines have everything, which `main` sends, or every rank (None) has to
    hand to its own.

    A bucket b takes arrive(b) = its bytes over the link; copy(b) = what is copied on the critical
    rank; send(b). While b is sent b + 1 arrives:

        arrive(1) + sum over b of copy(b) + send(b) + arrive(b + 1) - overlap min(send(b),
            arrive(b + 1))
    """
    total = _arrival(plan.buckets[0], rates, main)
    for bucket, following in pairwise([*plan.buckets, None]):
        assert bucket is not None
        send = bucket.nbytes / rates.send + rates.bucket_s
        arrival = _arrival(following, rates, main) if following is not None else 0.0
        overlapping = following is not None and plan.overlaps(bucket, following, main)
        hidden = rates.overlap * min(send, arrival) if overlapping else 0.0
        total += _copied(bucket, plan.limit, main) / rates.copy + send + arrival - hidden
    return total


def _arrival(bucket: Bucket, rates: Bandwidths, main: int | None) -> float:
    messages = bucket.messages(main).values()
    return sum(entry.shard_bytes for entries in messages for entry in entries) / rates.arrive


def _copied(bucket: Bucket, limit: int, main: int | None) -> int:
    """Bytes that are copied for a bucket: into place at `main`; or packed by who packs most, and
    put together.
    """
    if main is not None:
        return 0 if bucket.is_at(main) else bucket.own(main) + bucket.staged(main)
    packed = max(
        sum(entry.shard_bytes for entry in entries) for entries in bucket.messages(None).values()
    )
    return packed + bucket.nbytes * (bucket.nbytes <= limit)  # a larger one is whole as it arrives
