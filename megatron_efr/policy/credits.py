"""Per-token advantages of an iteration: each micro-batch's credits, whitened over all of them if
that is asked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_efr.algorithms.objective import Objective, Spread
from megatron_efr.kernels import Backend, token_credits
from megatron_efr.samples import PackedBatch


def fill_advantages(
    batches: list[PackedBatch],
    objective: Objective,
    sum_over_replicas: Callable[[torch.Tensor], torch.Tensor],
    backend: Backend = "torch",
) -> None:
    """Turn column `advantage` [R], the method's or the algorithm's, into what the loss reads.

    Less the KL to go, if the KL is in the reward, and whitened over every trained token of the
    iteration, on all replicas together. Old and reference log-probs must be there for the KL.
    """
    beta = objective.beta if objective.kl == "reward" else 0.0
    if beta == 0.0 and objective.tokens is None:
        return
    # the KL to go comes off token by token
    totals = []
    for batch in batches:
        columns = batch.columns
        made = token_credits(
            columns["advantage"], columns["weight"], batch.row_lengths, columns.get("old_logprob"),
            columns.get("reference_logprob"), beta=beta, backend=backend,
        )  # fmt: skip
        columns["advantage"] = made.advantages
        batch.live = None
        totals.append(made.sums)
    # whitening needs the sums of all replicas
    if objective.tokens is not None:
        _whiten(batches, sum_over_replicas(torch.stack(totals).sum(0)), objective.tokens)


def _whiten(batches: list[PackedBatch], totals: torch.Tensor, spread: Spread) -> None:
    """Mean 0 and spread 1 over all trained tokens, in place, from their sum, sum of squares and
    number.
    """
    total, squares, count = totals.tolist()
    count = max(count, 1.0)  # every response may be left out of the loss
    mean = total / count
    variance = max(squares / count - mean**2, 0.0)
    if spread.deviation == "sample" and count > 1:
        variance *= count / (count - 1)
    scale = spread.scale(variance)
    for batch in batches:
        batch.columns["advantage"].sub_(mean).div_(scale)
