"""How long a publication takes: a model of the plan, of which the bandwidths are inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from megatron_efr.weights.reshard import Bucket, Plan


@dataclass(frozen=True)
class Bandwidths:
    """Bytes per second of one rank that receives and hands on, and what the engines' answers cost."""

    arrive: float  # from the ranks that hold shards
    copy: float  # read here and written there: a message packed, a tensor put together
    send: float  # to the engines
    bucket_s: float = 0.0  # seconds of each bucket's call and answer
    overlap: float = 1.0  # how much of arriving hides behind sending: 0 where both need the same processor

    @property
    def values(self) -> tuple[float, ...]:
        return self.arrive, self.copy, self.send, self.bucket_s, self.overlap

    def bare(self) -> Bandwidths:
        """The same links, where nothing is packed, put together or answered."""
        return replace(self, copy=math.inf, bucket_s=0.0)


def seconds(plan: Plan, rates: Bandwidths, local_to: int | None = 0) -> float:
    """Seconds until the engines have everything.

    A bucket b takes arrive(b) = packing its longest message, and its bytes over the link; copy(b) = putting its
    together and into one piece; send(b). While b is sent b + 1 arrives:

        arrive(1) + sum over b of copy(b) + send(b) + arrive(b + 1) - overlap min(send(b), arrive(b + 1))

    `local_to`: the rank that receives, whose own whole parameters need no message; None where all ranks receive.
    """
    total = _arrival(plan.buckets[0], rates, local_to)
    for bucket, following in pairwise([*plan.buckets, None]):
        assert bucket is not None
        total += bucket.nbytes * (bucket.nbytes <= plan.limit) / rates.copy  # a larger one is whole as it arrives
        send = bucket.nbytes / rates.send + rates.bucket_s
        arrival = _arrival(following, rates, local_to) if following is not None else 0.0
        overlapping = following is not None and plan.overlaps(bucket, following)
        hidden = rates.overlap * min(send, arrival) if overlapping else 0.0
        total += send + arrival - hidden
    return total


def _arrival(bucket: Bucket, rates: Bandwidths, local_to: int | None) -> float:
    sizes = {r: sum(e.shard_bytes for e in entries) for r, entries in bucket.messages(local_to).items()}
    travelling = sum(size for rank, size in sizes.items() if rank != local_to)
    return max(sizes.values(), default=0) / rates.copy + travelling / rates.arrive
