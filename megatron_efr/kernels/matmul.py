"""Matrix products with fp32 results from 16-bit operands, wherever they run: of the head, and of
weights' gradients.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_efr.bfloat16_products import float32_sums, product_into, summed_in_float32

# rows of the weight at a time on a CPU, where operands are copied, or turned to fp32
_PART_ROWS = 2048


def logits_into(out: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden [rows, H] @ weight [V, H].T into `out` fp32 [rows, V].

    Logits rounded to bf16 would move log-probs by several 1e-2.
    """
    if weight.dtype == torch.float32:
        return torch.mm(hidden, weight.t(), out=out)
    if has_fp32_products(weight):
        return torch.ops.aten.mm.dtype_out(hidden, weight.t(), torch.float32, out=out)
    return _upcast_logits_into(out, hidden, weight)


def accumulate_weight_gradient(total: torch.Tensor, d_out: torch.Tensor, x: torch.Tensor) -> None:
    """total fp32 [V, H] += d_out [rows, V].T @ x [rows, H], both of the weight's dtype, summed in
    fp32.
    """
    if d_out.dtype == torch.float32:
        total.addmm_(d_out.t(), x)
    elif has_fp32_products(d_out):
        torch.ops.aten.addmm.dtype_out(total, d_out.t(), x, torch.float32, out=total)
    elif d_out.is_cpu and d_out.dtype == torch.bfloat16 and summed_in_float32():
        # by parts, since MKL copies what is transposed
        x = x.contiguous()
        for part in _parts(len(total)):
            product_into(total[part], d_out.t()[part], x, beta=1.0)
    else:
        _upcast_accumulate(total, d_out, x)


def has_fp32_products(operand: torch.Tensor) -> bool:
    """True if torch has `mm(out_dtype=)` and `addmm(out_dtype=)` for it: on CUDA, from 2.10 on.

    On a CPU operands are turned to fp32, a block of the weight at a time, but of gradients where
    MKL has a product into fp32. (Of logits that was slower at 49,152 columns and 683 rows.)
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


def _upcast_accumulate(total: torch.Tensor, d_out: torch.Tensor, x: torch.Tensor) -> None:
    wide = x.float()
    with float32_sums(d_out.dtype):
        for part in _parts(len(total)):
            total[part].addmm_(d_out[:, part].t().float(), wide)


def _parts(rows: int) -> Iterator[slice]:
    return (slice(start, start + _PART_ROWS) for start in range(0, rows, _PART_ROWS))
