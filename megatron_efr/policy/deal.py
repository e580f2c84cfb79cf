"""Deals rank 0's samples: into updates, to the replicas, and there into packed micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_efr.algorithms.objective import Objective
from megatron_efr.policy.packing import split_into_updates
from megatron_efr.policy.policy import Policy
from megatron_efr.policy.scatter import scatter_samples
from megatron_efr.samples import PackedBatch, Sample


def deal(
    policy: Policy,
    samples: Sequence[Sample],
    updates: int,
    micro_batch_tokens: int | None,
    objective: Objective,
    seed: Sequence[int],
) -> list[list[PackedBatch]]:
    """This replica's micro-batches of each of so many updates, from rank 0's samples; other ranks
    give none.

    Which samples form an update follows from `seed` alone: it is the same in every layout.
    """
    sizes = policy.ranks.share(lambda: [sample.size for sample in samples])
    plans = [
        policy.plan_update(
            sizes, update, micro_batch_tokens, objective.aggregate, objective.divisor
        )
        for update in split_into_updates(len(sizes), updates, seed)
    ]
    own = scatter_samples(samples, plans, policy.ranks)
    return [policy.pack(own, plan) for plan in plans]
