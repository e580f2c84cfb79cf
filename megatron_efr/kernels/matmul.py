"""The head's matrix products, with fp32 results from 16-bit operands wherever they run."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_efr.bfloat16_products import float32_sums, product_into, summed_in_float32

# rows of the weight turned to fp32 at a time if 16-bit operands have no fp32 product
_UPCAST_ROWS = 2048


def logits_into(out: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden [rows, H] @ weight [V, H].T into `out` fp32 [rows, V].

    Logits rounded to bf16 would move log-probs by several 1e-2.
    """
    if weight.dtype == torch.float32:
        return torch.mm(hidden, weight.t(), out=out)
    if has_fp32_products(weight):
        return torch.ops.aten.mm.dtype_out(hidden, weight.t(), torch.float32, out=out)
    return _upcast_logits_into(out, hidden, weight)


def accumulate_weight_gradient(
    total: torch.Tensor, d_logits: torch.Tensor, hidden: torch.Tensor
) -> None:
    """total fp32 [V, H] += d_logits [rows, V].T @ hidden [rows, H], both of the weight's dtype,
    summed in fp32.
    """
    if d_logits.dtype == torch.float32:
        total.addmm_(d_logits.t(), hidden)
    elif has_fp32_products(d_logits):
        torch.ops.aten.addmm.dtype_out(total, d_logits.t(), hidden, torch.float32, out=total)
    elif d_logits.is_cpu and d_logits.dtype == torch.bfloat16 and summed_in_float32():
        # logits gain nothing by it, of more than 400 rows
        product_into(total, d_logits.t(), hidden.contiguous(), beta=1.0)
    else:
        _upcast_accumulate(total, d_logits, hidden)


def has_fp32_products(operand: torch.Tensor) -> bool:
    """True if torch has `mm(out_dtype=)` and `addmm(out_dtype=)` for it: on CUDA, from 2.10 on.

    Elsewhere the fallback upcasts the operands to fp32, a block of the vocabulary at a time.
    """
    return operand.is_cuda and "dtype_out" in torch.ops.aten.addmm.overloads()


def _upcast_logits_into(
    out: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    wide = hidden.float()
    with float32_sums(weight.dtype):
        for part in _parts(len(weight)):
            torch.mm(wide, weight[part].float().t(), out=out[:, part])
    return out


def _upcast_accumulate(total: torch.Tensor, d_logits: torch.Tensor, hidden: torch.Tensor) -> None:
    wide = hidden.float()
    with float32_sums(d_logits.dtype):
        for part in _parts(len(total)):
            total[part].addmm_(d_logits[:, part].t().float(), wide)


def _parts(rows: int) -> Iterator[slice]:
    return (slice(start, start + _UPCAST_ROWS) for start in range(0, rows, _UPCAST_ROWS))
