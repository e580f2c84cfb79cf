"""The row kernels in plain torch: the reference, and the path on CPU. Contract: row_kernels.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_efr.algorithms.objective import Objective
from megatron_efr.compiled import loops_for
from megatron_efr.kernels.row_kernels import Logits, PolicyRows, Softmax, Statistics, chunks

_LOWEST = -1e30  # for -inf, which is to add nothing: (-inf) * 0 would be nan
_BLOCK_BYTES = 2**21  # of fp32 logits worked on at a time, in a CPU's cache
_BLOCK_BYTES_CUDA = 2**28


def statistics(logits: Logits, entropy: bool) -> Statistics:
    """Peak, sums and target of each row."""
    found = torch.zeros(4, len(logits.values), dtype=torch.float32, device=logits.values.device)
    if not logits.columns:  # this rank holds nothing but padding
        return Statistics(found[0].fill_(-torch.inf), found[1], found[2], found[3])
    for rows, z, other in _blocks(logits):
        peak, total, moment, target = (each[rows] for each in found)
        torch.gather(z, 1, logits.targets[rows].clamp(min=0)[:, None], out=target[:, None])
        torch.amax(z, 1, out=peak)
        torch.sum(torch.exp(z.sub_(peak[:, None]), out=other), 1, out=total)
        if entropy:
            torch.sum(z.clamp_(min=_LOWEST).mul_(other), 1, out=moment)
    return Statistics(*found)


def write_gradient(
    logits: Logits,
    softmax: Softmax,
    grad_logprob: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Gradient of the logits [rows, V]: `RowKernels.write_gradient`.

    d logprob = onehot - p,  d entropy = -p (log p + entropy),  each over the temperature and times
    its own gradient, fp32 [rows].
    """
    out = _room(logits.values, dtype)
    owned = torch.where(logits.targets >= 0, grad_logprob, 0.0)[:, None]
    if logits.values.is_contiguous() and (loops := loops_for(logits.values, out)):
        none = torch.zeros_like(grad_logprob)
        entropy, d_entropy = (none if x is None else x for x in (softmax.entropy, grad_entropy))
        row = (softmax.peak, softmax.log_total, entropy, grad_logprob, d_entropy, owned[:, 0])
        loops.write_logits_gradient(
            logits.values, out, logits.columns, logits.scale, logits.targets, torch.stack(row)
        )
        return out
    dead = grad_logprob == 0 if grad_entropy is None else (grad_logprob == 0) & (grad_entropy == 0)
    for rows, z, p in _blocks(logits):
        z.sub_(softmax.peak[rows, None]).sub_(softmax.log_total[rows, None]).clamp_(min=_LOWEST)
        torch.exp(z, out=p)
        if grad_entropy is not None:
            assert softmax.entropy is not None
            z.add_(softmax.entropy[rows, None]).mul_(grad_entropy[rows, None]).add_(
                grad_logprob[rows, None]
            ).mul_(p)
        else:
            torch.mul(p, grad_logprob[rows, None], out=z)
        z.neg_().scatter_add_(1, logits.targets[rows].clamp(min=0)[:, None], owned[rows])
        out[rows, : logits.columns] = z.mul_(logits.scale).masked_fill_(dead[rows, None], 0.0)
    out[:, logits.columns :] = 0.0
    return out


def _blocks(logits: Logits) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Runs of rows: which, their logits over temperature, fp32 [rows, columns], and room for as
    much.

    The same memory each time: a fresh tensor for each block leaves holes in the heap that the next
    does not fit in.
    """
    values, columns = logits.values, logits.columns
    size = max(1, (_BLOCK_BYTES_CUDA if values.is_cuda else _BLOCK_BYTES) // (4 * max(1, columns)))
    room = torch.empty(
        2, min(size, len(values)), columns, dtype=torch.float32, device=values.device
    )
    for rows in chunks(len(values) if columns else 0, size):
        z, other = room[:, : rows.stop - rows.start]
        z.copy_(values[rows, :columns])
        yield rows, z if logits.scale == 1.0 else z.mul_(logits.scale), other


def _room(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Memory for [rows, columns] of `dtype`: that of `values`, row over row, unless wider."""
    if dtype.itemsize > values.element_size():
        return torch.empty_like(values, dtype=dtype)
    return values.view(dtype)[:, : values.shape[1]]


def policy_rows(
    logits: Logits,
    softmax: Softmax,
    rows: PolicyRows,
    objective: Objective,
    factor: float,
    dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """FIGURES [8, rows] and the gradient of the logits [rows, V], or None: `RowKernels`."""
    log_ratio = softmax.logprob - rows.old
    figures, slope = token_terms(softmax.logprob, log_ratio, softmax.entropy, rows, objective)
    if dtype is None:
        return figures, None
    w = rows.weights
    grad_entropy = None if objective.bonus == 0.0 else -factor * objective.bonus * w
    return figures, write_gradient(logits, softmax, factor * w * slope, grad_entropy, dtype)


def token_terms(
    logprob: torch.Tensor,
    log_ratio: torch.Tensor,
    entropy: torch.Tensor | None,
    rows: PolicyRows,
    objective: Objective,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FIGURES [8, rows], and each row's derivative of the unweighted loss by its log-prob, entropy
    left out.

    A row of weight 0 adds exactly 0, whatever it holds: nobody trains it, so nobody has looked.
    `log_ratio` is the token's own, or its sequence's; the ratio's derivative is the ratio in both
    cases.
    """
    # the surrogate, by the importance of tokens that other weights drew
    ratio = log_ratio.exp()
    value, slope, cut = _surrogate(logprob, ratio, rows.advantages, objective)
    if rows.importance is not None:
        value, slope = rows.importance * value, rows.importance * slope
    # KL and entropy in the loss
    kl, kl_slope = _kl(logprob, rows, objective)
    loss, slope = objective.beta * kl - value, objective.beta * kl_slope - slope
    measured = torch.zeros_like(logprob) if entropy is None else entropy
    if objective.bonus != 0.0:
        loss = loss - objective.bonus * measured
    # figures, weighted; rows of weight 0 add exactly 0
    above, below = cut & (ratio > 1.0), cut & (ratio < 1.0)
    terms = torch.stack([loss, cut.float(), above.float(), below.float(), -log_ratio, kl, measured])
    trained = rows.weights != 0.0
    weighted = torch.where(trained, rows.weights * terms, 0.0)
    return torch.cat([weighted, ratio[None]]), torch.where(trained, slope, 0.0)


def _surrogate(
    logprob: torch.Tensor, ratio: torch.Tensor, advantages: torch.Tensor, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The surrogate, its derivative by the log-prob, and a mask of the rows that a bound changed.

    nan stays nan.
    """
    bounded = ratio.clamp(1.0 - objective.low, 1.0 + objective.high)
    if objective.surrogate == "reweight":
        slope = bounded * advantages
        return slope * logprob, slope, bounded != ratio
    plain, clipped = ratio * advantages, bounded * advantages
    value = torch.minimum(plain, clipped)
    cut = clipped < plain
    if objective.dual is not None:
        least = torch.where(advantages < 0, objective.dual * advantages, -torch.inf)
        value, cut = torch.maximum(value, least), cut | (value < least)
    return value, torch.where(cut, 0.0, plain), cut


def _kl(
    logprob: torch.Tensor, rows: PolicyRows, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor]:
    """The KL's estimate and its derivative by the log-prob."""
    if objective.loss_kl == "none":
        return torch.zeros_like(logprob), torch.zeros_like(logprob)
    assert rows.reference is not None
    d = rows.reference - logprob
    if objective.loss_kl == "k1":
        return -d, torch.ones_like(d)
    if objective.loss_kl == "k2":
        return 0.5 * d * d, -d
    return torch.expm1(d) - d, -torch.expm1(d)
