"""From one advantage per response to one per token: the KL to the initial model to go, and whitening."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_efr.config import LossConfig
from megatron_efr.types import ByIndex, PackedBatch

_MIN_VARIANCE = 1e-8  # the released trainer's clamp


def fill_token_advantages(
    batches: list[PackedBatch],
    advantages: ByIndex[float],
    config: LossConfig,
    sum_over_replicas: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Set `batch.advantages` [R] from `advantages[i]` of sequence i, once old and reference log-probs are known.

    `normalize: batch` whitens over every token of the iteration, on all replicas together.
    """
    for batch in batches:
        device = batch.weights.device
        values = torch.tensor([advantages[i] for i in batch.indices], dtype=torch.float32, device=device)
        per_token = values.repeat_interleave(torch.tensor(batch.row_lengths, dtype=torch.int64, device=device))
        if config.beta > 0:
            assert batch.old_logprobs is not None
            assert batch.reference_logprobs is not None
            per_token -= config.beta * kl_to_go(batch.old_logprobs - batch.reference_logprobs, batch.row_lengths)
        batch.advantages = per_token
        batch.live = _live(batch, advantages) if config.beta == 0 and config.normalize == "none" else None
    if config.normalize == "batch":
        _whiten([batch.advantages for batch in batches if batch.advantages is not None], sum_over_replicas)


def _live(batch: PackedBatch, advantages: ByIndex[float]) -> int:
    """How many leading sequences hold every advantage that is not 0."""
    return max((place for place, i in enumerate(batch.indices, start=1) if advantages[i] != 0.0), default=0)


def kl_to_go(log_ratio: torch.Tensor, row_lengths: list[int]) -> torch.Tensor:
    """sum_{t' >= t} log_ratio_{t'} within each response, [R]: the k1 estimate of the KL still to be paid, gamma 1.

    Arora & Zanette 2025 put the KL into the reward; A_{i,t} = A_i - beta * this.
    """
    sums = torch.empty_like(log_ratio)
    for part, out in zip(log_ratio.split(row_lengths), sums.split(row_lengths), strict=True):
        out.copy_(part.double().flip(0).cumsum(0).flip(0))
    return sums


def _whiten(parts: list[torch.Tensor], sum_over_replicas: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Mean 0, standard deviation 1 over all tokens, in place; the variance is the population's, clamped at 1e-8."""
    totals = torch.stack([torch.stack([p.double().sum(), p.double().new_tensor(float(p.numel()))]) for p in parts])
    total, count = sum_over_replicas(totals.sum(0)).tolist()
    mean = total / count
    squares = torch.stack([((p.double() - mean) ** 2).sum() for p in parts]).sum()
    variance = max(float(sum_over_replicas(squares)) / count, _MIN_VARIANCE)
    for part in parts:
        part.sub_(mean).div_(variance**0.5)
