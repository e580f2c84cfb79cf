"""Per-token advantages of an iteration: each micro-batch's credits, whitened over all of them where that is asked."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_efr.algorithms.objective import Objective, Spread
from megatron_efr.kernels import Backend, token_credits
from megatron_efr.types import ByIndex, PackedBatch


def fill_advantages(
    batches: list[PackedBatch],
    advantages: ByIndex[float],
    objective: Objective,
    sum_over_replicas: Callable[[torch.Tensor], torch.Tensor],
    backend: Backend = "torch",
) -> None:
    """Set `batch.advantages` [R] from `advantages[i]` of sequence i, once old and reference log-probs are known.

    Whitening runs over every token of the iteration, on all replicas together.
    """
    beta = objective.beta if objective.kl == "reward" else 0.0
    totals = []
    for batch in batches:
        values = torch.tensor([advantages[i] for i in batch.indices], dtype=torch.float32, device=batch.weights.device)
        made = token_credits(
            values, batch.row_lengths, batch.old_logprobs, batch.reference_logprobs, beta=beta, backend=backend
        )
        batch.advantages = made.advantages
        batch.live = None if objective.every_advantage else _live(batch, advantages)
        totals.append(torch.cat([made.sums, made.sums.new_tensor([float(made.advantages.numel())])]))
    if objective.tokens is not None:
        _whiten(batches, sum_over_replicas(torch.stack(totals).sum(0)), objective.tokens)


def _live(batch: PackedBatch, advantages: ByIndex[float]) -> int:
    """How many leading sequences hold every advantage that is not 0."""
    return max((place for place, i in enumerate(batch.indices, start=1) if advantages[i] != 0.0), default=0)


def _whiten(batches: list[PackedBatch], totals: torch.Tensor, spread: Spread) -> None:
    """Mean 0 and spread 1 over all tokens, in place, from their sum, sum of squares and number."""
    total, squares, count = totals.tolist()
    mean = total / count
    variance = max(squares / count - mean**2, 0.0)
    if spread.deviation == "sample" and count > 1:
        variance *= count / (count - 1)
    scale = spread.scale(variance)
    for batch in batches:
        assert batch.advantages is not None
        batch.advantages.sub_(mean).div_(scale)
