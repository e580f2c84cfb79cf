"""The row kernels in Triton: a program per row of logits, no atomics. Contract: row_kernels.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from megatron_efr.algorithms.objective import Objective
from megatron_efr.kernels.row_kernels import FIGURES, Logits, PolicyRows, Softmax, Statistics

BLOCK = 4096  # columns in flight per program
WARPS = 8
KL_CODES = {"none": 0, "k1": 1, "k2": 2, "k3": 3}

# per-row vectors begin at any row and row counts vary with the data: specialising on either would
# compile for minutes
_ROW_VECTORS = [
    "targets", "peaks", "totals", "moments", "target_logits", "log_totals", "logprobs", "entropies",
    "grad_logprob", "grad_entropy", "olds", "advantages", "weights", "references", "importances",
    "figures",
]  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=_ROW_VECTORS)
def statistics_kernel(
    logits, stride, targets, peaks, totals, moments, target_logits, columns, scale,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pass over a row: running peak, sums relative to it (kept lane by lane), and the target's
    logit.
    """
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31
    base = logits + row * stride
    lanes = tl.arange(0, BLOCK)
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + lanes
        z = (
            tl.load(base + column, mask=column < columns, other=float("-inf")).to(tl.float32)
            * scale
        )
        # online softmax: what was summed so far moves to the new peak
        higher = tl.maximum(peak, tl.max(z, 0))
        # the first block has nothing to shrink
        drop = tl.where(peak == float("-inf"), 0.0, peak - higher)
        shrink = tl.exp(drop)
        exp = tl.exp(z - higher)
        if ENTROPY:
            # sum (z - higher) e^(z - higher), from the sum relative to the old peak; lanes past the
            # end are -inf * 0
            moment = (moment + drop * total) * shrink + tl.where(exp > 0, (z - higher) * exp, 0.0)
        total = total * shrink + exp
        peak = higher
    # the lanes are summed once, at the end of the row
    tl.store(peaks + row, peak)
    tl.store(totals + row, tl.sum(total, 0))
    if ENTROPY:
        tl.store(moments + row, tl.sum(moment, 0))
    # below 0: the target is no column of this tensor rank
    target = tl.load(targets + row)
    here = tl.load(base + target, mask=target >= 0, other=0.0).to(tl.float32)
    tl.store(target_logits + row, here * scale)


@triton.jit
def _write_row(
    base, out, columns, width, scale, target, peak, log_total, entropy, g, h,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """g * d logprob + h * d entropy by the row's logits, over the logits themselves, in out's
    (narrower) type.

    A block's store lands on logits of this block or an earlier one, which other threads of the
    program may still be reading: hence the barrier. Later blocks lie beyond it.
    """
    lanes = tl.arange(0, BLOCK)
    size = tl.abs(g) + tl.abs(h)  # 0: the row stays exactly 0, whatever its logits; nan stays nan
    for start in range(0, width, BLOCK):
        column = start + lanes
        inside = column < columns
        z = tl.load(base + column, mask=inside, other=0.0).to(tl.float32) * scale
        log_p = (z - peak) - log_total
        p = tl.exp(log_p)
        gradient = tl.where(column == target, g, 0.0) - g * p
        if ENTROPY:
            gradient -= h * tl.where(p > 0, p * (log_p + entropy), 0.0)
        gradient = tl.where(inside, tl.where(size > 0.0, gradient * scale, size), 0.0)
        tl.debug_barrier()
        tl.store(out + column, gradient.to(out.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize_on_alignment=_ROW_VECTORS)
def gradient_kernel(
    logits, stride, out, out_stride, targets, peaks, log_totals, entropies, grad_logprob,
    grad_entropy,
    columns, width, scale, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d logits of given gradients by log-prob and entropy."""
    row = tl.program_id(0).to(tl.int64)
    entropy = tl.zeros((), tl.float32)
    h = tl.zeros((), tl.float32)
    if ENTROPY:
        entropy = tl.load(entropies + row)
        h = tl.load(grad_entropy + row)
    _write_row(
        logits + row * stride, out + row * out_stride, columns, width, scale,
        tl.load(targets + row),
        tl.load(peaks + row), tl.load(log_totals + row), entropy, tl.load(grad_logprob + row), h,
        ENTROPY, BLOCK,
    )  # fmt: skip


@triton.jit
def _surrogate(
    logprob, ratio, advantage, low, high, dual, REWEIGHT: tl.constexpr, DUAL: tl.constexpr
):  # fmt: skip
    """The surrogate, its derivative by the log-prob, and 1 if a bound changed it; nan stays nan."""
    bounded = tl.minimum(tl.maximum(ratio, low), high)
    if REWEIGHT:
        cut = bounded != ratio
        slope = tl.where(ratio == ratio, bounded, ratio) * advantage
        value = slope * logprob
    else:
        plain = ratio * advantage
        clipped = bounded * advantage
        cut = clipped < plain
        value = tl.where(cut, clipped, plain)
        if DUAL:
            least = tl.where(advantage < 0.0, dual * advantage, float("-inf"))
            cut = cut | (value < least)
            value = tl.where(value < least, least, value)
        slope = tl.where(cut, 0.0, plain)
    return value, slope, cut


@triton.jit
def _kl(d, KL: tl.constexpr):
    """The KL's estimate from d = log pi_reference - log pi, and its derivative by log pi."""
    # exp(d) - 1 would cancel for small d; the series' next term is then below 3e-9
    series = d * (1.0 + d * (0.5 + d * (1.0 / 6.0 + d * (1.0 / 24.0 + d * (1.0 / 120.0)))))
    growth = tl.where(tl.abs(d) < 0.05, series, tl.exp(d) - 1.0)
    if KL == 1:
        kl = -d
        slope = d * 0.0 + 1.0
    elif KL == 2:
        kl = 0.5 * d * d
        slope = -d
    else:
        kl = growth - d
        slope = -growth
    return kl, slope


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=_ROW_VECTORS)
def policy_kernel(
    logits, stride, out, out_stride, targets, peaks, log_totals, logprobs, entropies,
    olds, advantages, weights, references, importances, figures, rows, columns, width, scale,
    low, high, dual, beta, bonus, factor,
    REWEIGHT: tl.constexpr, DUAL: tl.constexpr, KL: tl.constexpr, ENTROPY: tl.constexpr,
    BONUS: tl.constexpr,
    IMPORTANCE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of one token (`Objective`), what is measured of it, and its gradient by the
    logits.
    """
    # the token: its log-prob here, and what the rollout and the credits say of it
    row = tl.program_id(0).to(tl.int64)
    logprob = tl.load(logprobs + row)
    advantage = tl.load(advantages + row)
    weight = tl.load(weights + row)
    log_ratio = logprob - tl.load(olds + row)
    ratio = tl.exp(log_ratio)
    # the surrogate, by the importance of tokens that other weights drew
    value, slope, cut = _surrogate(  # pyright: ignore[reportGeneralTypeIssues]
        logprob, ratio, advantage, low, high, dual, REWEIGHT, DUAL
    )
    if IMPORTANCE:
        importance = tl.load(importances + row)
        value *= importance
        slope *= importance
    # KL and entropy in the loss; the entropy's slope is written with the row
    loss = -value
    slope = -slope
    kl = 0.0
    if KL > 0:
        kl, kl_slope = _kl(tl.load(references + row) - logprob, KL)  # pyright: ignore[reportGeneralTypeIssues]
        loss += beta * kl
        slope += beta * kl_slope
    # measured if it is asked for, and in the loss if it has a weight there
    entropy = 0.0
    if ENTROPY:
        entropy = tl.load(entropies + row)
        if BONUS:
            loss -= bonus * entropy
    trained = weight != 0.0  # a row of weight 0 adds exactly 0, whatever it holds
    slope = tl.where(trained, slope, 0.0)
    # an entry in each of FIGURES, in their order
    tl.store(figures + row, tl.where(trained, weight * loss, 0.0))
    tl.store(figures + rows + row, tl.where(cut, weight, 0.0))
    tl.store(figures + 2 * rows + row, tl.where(cut & (ratio > 1.0), weight, 0.0))
    tl.store(figures + 3 * rows + row, tl.where(cut & (ratio < 1.0), weight, 0.0))
    tl.store(figures + 4 * rows + row, tl.where(trained, -weight * log_ratio, 0.0))
    tl.store(figures + 5 * rows + row, tl.where(trained, weight * kl, 0.0))
    tl.store(figures + 6 * rows + row, tl.where(trained, weight * entropy, 0.0))
    tl.store(figures + 7 * rows + row, ratio)
    # the logits are at hand: their gradient takes their place in the same launch
    if GRADIENT:
        _write_row(
            logits + row * stride, out + row * out_stride, columns, width, scale,
            tl.load(targets + row),
            tl.load(peaks + row), tl.load(log_totals + row), entropy, factor * weight * slope,
            -factor * bonus * weight, BONUS, BLOCK,
        )  # fmt: skip


def statistics(logits: Logits, entropy: bool) -> Statistics:
    """Peak, sums and target of each row."""
    values = logits.values
    peak, total, moment, target = torch.zeros(
        4, len(values), dtype=torch.float32, device=values.device
    ).unbind()
    _launch(
        statistics_kernel, values, logits.targets, peak, total, moment, target, logits.columns,
        logits.scale,
        ENTROPY=entropy,
    )  # fmt: skip
    return Statistics(peak, total, moment, target)


def write_gradient(
    logits: Logits,
    softmax: Softmax,
    grad_logprob: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Gradient of the logits [rows, V] in `dtype`, in their memory; ValueError: no room."""
    out = _narrowed(logits.values, dtype)
    unused = grad_logprob
    _launch(
        gradient_kernel, logits.values, out, out.stride(0), logits.targets, softmax.peak,
        softmax.log_total,
        unused if grad_entropy is None else softmax.entropy, grad_logprob,
        unused if grad_entropy is None else grad_entropy, logits.columns, out.shape[1],
        logits.scale,
        ENTROPY=grad_entropy is not None,
    )  # fmt: skip
    return out


def policy_rows(
    logits: Logits,
    softmax: Softmax,
    rows: PolicyRows,
    objective: Objective,
    factor: float,
    dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """FIGURES [8, rows], and the gradient of the logits in their memory if `dtype` is given."""
    values = logits.values
    # without a dtype no gradient is written, and the kernel gets the logits in its place
    figures = torch.empty(len(FIGURES), len(values), dtype=torch.float32, device=values.device)
    out = None if dtype is None else _narrowed(values, dtype)
    written = values if out is None else out
    # pointers that the kernel does not read need not be valid values
    unused = rows.old
    _launch(
        policy_kernel, values, written, written.stride(0), logits.targets,
        softmax.peak, softmax.log_total, softmax.logprob,
        unused if softmax.entropy is None else softmax.entropy, rows.old, rows.advantages,
        rows.weights,
        unused if objective.loss_kl == "none" else rows.reference,
        unused if rows.importance is None else rows.importance,
        figures, len(values), logits.columns, values.shape[1], logits.scale,
        1.0 - objective.low, 1.0 + objective.high, objective.dual or 0.0, objective.beta,
        objective.bonus, factor,
        REWEIGHT=objective.surrogate == "reweight", DUAL=objective.dual is not None,
        KL=KL_CODES[objective.loss_kl], ENTROPY=softmax.entropy is not None,
        BONUS=objective.bonus != 0.0,
        IMPORTANCE=rows.importance is not None, GRADIENT=out is not None,
    )  # fmt: skip
    return figures, out


def _narrowed(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The memory of each row of values seen as `dtype`, [rows, V] with the rows' distance unchanged
    in bytes.
    """
    if dtype.itemsize > values.element_size():
        raise ValueError(f"a {dtype} gradient does not fit over {values.dtype} logits")
    return values.view(dtype)[:, : values.shape[1]]


def _launch(kernel: Any, values: torch.Tensor, *arguments: Any, **constants: Any) -> None:
    """Run `kernel` on every row. Rows narrower than one block get a block of their own width."""
    if len(values):
        block, warps = shape_for(values.shape[1])
        kernel[(len(values),)](
            values, values.stride(0), *arguments, **constants, BLOCK=block, num_warps=warps
        )


def shape_for(width: int) -> tuple[int, int]:
    """Columns per block, and warps, for rows of this width."""
    block = max(16, min(BLOCK, 1 << (width - 1).bit_length()))
    return block, max(1, min(WARPS, WARPS * block // BLOCK))
