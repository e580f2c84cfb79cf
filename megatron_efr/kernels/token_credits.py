"""Per-token credits of a micro-batch: the KL still to be paid comes off, and their sums are taken
for whitening.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_efr.kernels.backend import Backend


class TokenCredits(NamedTuple):
    """`advantages` fp32 [R], and fp64 [3] of the trained tokens' their sum, sum of squares and
    number.
    """

    advantages: torch.Tensor
    sums: torch.Tensor


def token_credits(
    advantages: torch.Tensor,
    weights: torch.Tensor,
    row_lengths: Sequence[int],
    old: torch.Tensor | None,
    reference: torch.Tensor | None,
    *,
    beta: float,
    backend: Backend = "torch",
) -> TokenCredits:
    """A_t - beta sum_{t' >= t} (old - reference)_{t'} within each response of a micro-batch as it
    is packed.

    `advantages`, `weights` fp32 [R]; `row_lengths` the numbers of the responses' tokens, which
    stand end to end; `old`, `reference` fp32 [R], log-probs before the update and under the initial
    model, if `beta` is not 0: the k1 estimate of the KL to go, gamma 1 (Arora & Zanette 2025 put
    the KL into the reward). A token of weight 0 is not trained: it is in no sum, since it may not
    be the policy's own. Triton takes one launch.
    """
    if beta == 0.0:
        old = reference = None
    # Triton: one launch for all responses
    if backend == "triton":
        from megatron_efr.kernels.triton_credits import credit_rows

        return TokenCredits(*credit_rows(advantages, weights, row_lengths, old, reference, beta))
    # plain torch: take off the KL to go, then the sums that whitening needs
    trained = weights > 0
    if old is not None and reference is not None:
        advantages = advantages - beta * kl_to_go(
            torch.where(trained, old - reference, 0.0), row_lengths
        )
    wide = torch.where(trained, advantages, 0.0).double()
    return TokenCredits(
        advantages, torch.stack([wide.sum(), (wide * wide).sum(), trained.double().sum()])
    )


def kl_to_go(log_ratio: torch.Tensor, row_lengths: Sequence[int]) -> torch.Tensor:
    """sum_{t' >= t} log_ratio_{t'} within each response, fp32 [R], summed in fp64."""
    sums = torch.empty_like(log_ratio)
    lengths = list(row_lengths)
    for part, out in zip(log_ratio.split(lengths), sums.split(lengths), strict=True):
        out.copy_(part.double().flip(0).cumsum(0).flip(0))
    return sums
