"""From one advantage per response to one per token of a micro-batch: broadcast, the KL still to be paid, and sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_efr.kernels.backend import Backend


class TokenCredits(NamedTuple):
    """`advantages` fp32 [R], and fp64 [2] their sum and sum of squares, for whitening."""

    advantages: torch.Tensor
    sums: torch.Tensor


def token_credits(
    advantages: torch.Tensor,
    row_lengths: Sequence[int],
    old: torch.Tensor | None,
    reference: torch.Tensor | None,
    *,
    beta: float,
    backend: Backend = "torch",
) -> TokenCredits:
    """A_{i,t} = A_i - beta sum_{t' >= t} (old - reference)_{i,t'}, of a micro-batch as it is packed.

    `advantages` fp32 [S], one for each sequence; `row_lengths` the S numbers of its response tokens, which stand end to
    end; `old`, `reference` fp32 [R], log-probs before the update and under the initial model, where `beta` is not 0:
    the k1 estimate of the KL to go, gamma 1 (Arora & Zanette 2025 put the KL into the reward). Triton takes one launch.
    """
    if beta == 0.0:
        old = reference = None
    if backend == "triton":
        from megatron_efr.kernels.triton_credits import credit_rows

        return TokenCredits(*credit_rows(advantages, row_lengths, old, reference, beta))
    lengths = torch.tensor(row_lengths, dtype=torch.int64, device=advantages.device)
    per_token = advantages.repeat_interleave(lengths)
    if old is not None and reference is not None:
        per_token -= beta * kl_to_go(old - reference, row_lengths)
    wide = per_token.double()
    return TokenCredits(per_token, torch.stack([wide.sum(), (wide * wide).sum()]))


def kl_to_go(log_ratio: torch.Tensor, row_lengths: Sequence[int]) -> torch.Tensor:
    """sum_{t' >= t} log_ratio_{t'} within each response, fp32 [R], summed in fp64."""
    sums, lengths = torch.empty_like(log_ratio), list(row_lengths)
    for part, out in zip(log_ratio.split(lengths), sums.split(lengths), strict=True):
        out.copy_(part.double().flip(0).cumsum(0).flip(0))
    return sums
