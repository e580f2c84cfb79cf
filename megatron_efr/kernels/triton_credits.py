"""Per-token credits of a micro-batch in one Triton launch: one program per response, no atomics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 1024  # tokens in flight per program
WARPS = 8


@triton.jit(
    do_not_specialize_on_alignment=["advantages", "weights", "olds", "references", "per_token"]
)
def credit_kernel(
    advantages, weights, ends, olds, references, per_token, sums, squares, counts, beta,
    KL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The formula of `token_credits`, from a response's end, at which no KL is left to pay."""
    # this program's response, tokens `first` to `last` of the micro-batch
    response = tl.program_id(0)
    first = tl.load(ends + response)
    last = tl.load(ends + response + 1) - 1
    length = last - first + 1
    # KL still to pay in fp64; moments lane by lane, and summed once at the end
    to_go = tl.zeros((), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    square = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((), tl.int32)
    for done in range(0, length, BLOCK):
        back = done + tl.arange(0, BLOCK)  # tokens counted from the response's end
        inside = back < length
        trained = tl.load(weights + last - back, mask=inside, other=0.0) > 0.0
        credit = tl.load(advantages + last - back, mask=inside, other=0.0)
        if KL:
            old = tl.load(olds + last - back, mask=trained, other=0.0)
            log_ratio = (old - tl.load(references + last - back, mask=trained, other=0.0)).to(
                tl.float64
            )
            # rounded as the twin rounds: the KL to go, its product with beta, the difference
            credit -= beta * (tl.cumsum(log_ratio, 0) + to_go).to(tl.float32)
            to_go += tl.sum(log_ratio, 0)
        tl.store(per_token + last - back, credit, mask=inside)
        # moments of trained tokens alone: one of weight 0 has a credit, and no say in them
        wide = tl.where(trained, credit, 0.0).to(tl.float64)
        total += wide
        square += wide * wide
        count += tl.sum(trained.to(tl.int32), 0)
    tl.store(sums + response, tl.sum(total, 0))
    tl.store(squares + response, tl.sum(square, 0))
    tl.store(counts + response, count.to(tl.float64))


def credit_rows(
    advantages: torch.Tensor,
    weights: torch.Tensor,
    row_lengths: Sequence[int],
    old: torch.Tensor | None,
    reference: torch.Tensor | None,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Credits fp32 [R], and fp64 [3] of the trained tokens' their sum, sum of squares and
    number.
    """
    device = advantages.device
    responses = len(row_lengths)
    ends = torch.tensor([0, *row_lengths], dtype=torch.int64).cumsum(0).to(device)
    per_token = torch.empty(sum(row_lengths), dtype=torch.float32, device=device)
    sums = torch.zeros(3, responses, dtype=torch.float64, device=device)
    if responses:
        kernel: Any = credit_kernel
        unused = per_token
        kernel[(responses,)](
            advantages.contiguous(), weights.contiguous(), ends,
            unused if old is None else old.contiguous(),
            unused if reference is None else reference.contiguous(), per_token, sums[0], sums[1],
            sums[2], beta,
            KL=old is not None and reference is not None, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return per_token, sums.sum(1)
