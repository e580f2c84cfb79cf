"""The training pass in one sweep over token chunks: loss, figures and gradients from logits that exist once.

Three matrix products where a recomputing backward pass needs four. Chunk by chunk: fp32 logits into one buffer, row
statistics, their merge over tensor parallelism, then the loss and, over the logits themselves, their gradient; then the
gradients of hidden and weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_efr.kernels.backend import Backend
from megatron_efr.kernels.linear_logprob import CHUNK_TOKENS, Head, logits_buffer, prepare
from megatron_efr.kernels.products import accumulate_weight_gradient, logits_into
from megatron_efr.kernels.rows import FIGURES, PolicyRows, PolicyTerms, live_spans

_FACTOR_TOLERANCE = 1e-6  # fp32 products of the same factors in another order


class FusedLoss(NamedTuple):
    """`loss` is differentiable in hidden; `logprobs` fp32 [T] and `figures` (fp32 scalars) are not.

    Figures are sums of weight times term, `ratio_max` the largest ratio; those of terms that are off are left out.
    """

    loss: torch.Tensor
    logprobs: torch.Tensor
    figures: dict[str, torch.Tensor]


def fused_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    rows: PolicyRows,
    terms: PolicyTerms,
    *,
    main_grad: torch.Tensor,
    factor: float,
    temperature: float = 1.0,
    true_vocab: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk: int = CHUNK_TOKENS,
    backend: Backend = "torch",
) -> FusedLoss:
    """Sum over rows of weights * `PolicyTerms`, its figures, and, in the same pass, its gradients.

    `hidden` [T, H], `weight` [V_local, H], `targets` int64 [T] as in `linear_logprob`; `rows` fp32 [T] each. Where
    gradients are on, the gradient of `weight` is added to `main_grad` (fp32 [V_local, H]) at once, times `factor`: what
    the caller will scale the loss by afterwards (loss scale, divisions by micro-batches or tokens). The backward pass
    returns the gradient of `hidden`, summed over `tp_group`, and RuntimeError if another factor arrives; autograd's own
    gradient of `weight` is none. Under no_grad nothing is written. Rows of advantage 0 (or weight 0)
    at either end of a chunk are left out of the gradients' products where no KL or entropy gives them one.

    ValueError for a `main_grad` that is not fp32, or a term whose rows are missing; IndexError as `linear_logprob`.
    """
    _check(weight, rows, terms, main_grad)
    head, local = prepare(weight, targets, temperature, true_vocab, tp_group, chunk, backend)
    rows = rows.plain()
    needs_gradient = torch.is_grad_enabled() and hidden.requires_grad
    with torch.no_grad():
        logprobs, figures, gradient = _sweep(
            hidden, weight, local, rows, terms, head, main_grad, factor if needs_gradient else None
        )
        sums = dict(zip(FIGURES, figures.double().sum(1).float(), strict=True))
        sums["ratio_max"] = torch.cat([figures[-1], figures.new_zeros(1)]).max()  # an empty micro-batch has none
    absent = {"kl_to_reference": terms.kl == "none", "entropy": terms.bonus == 0.0, "importance": terms.cap is None}
    kept = {name: value for name, value in sums.items() if not absent.get(name, False)}
    loss = sums["loss"] if gradient is None else _Attach.apply(hidden, sums["loss"], gradient, factor)
    return FusedLoss(loss, logprobs, kept)


def _check(weight: torch.Tensor, rows: PolicyRows, terms: PolicyTerms, main_grad: torch.Tensor) -> None:
    if main_grad.dtype != torch.float32 or main_grad.shape != weight.shape:
        raise ValueError(
            f"main_grad is {main_grad.dtype} {tuple(main_grad.shape)}; the head adds to an fp32 {tuple(weight.shape)} "
            "(Megatron: grad_reduce_in_fp32)"
        )
    if terms.kl != "none" and rows.reference is None:
        raise ValueError(f"kl {terms.kl} needs the reference's log-probs")
    if terms.cap is not None and rows.engine is None:
        raise ValueError("a cap on importance weights needs the engine's log-probs")


def _sweep(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    local: torch.Tensor,
    rows: PolicyRows,
    terms: PolicyTerms,
    head: Head,
    main_grad: torch.Tensor,
    factor: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Log-probs [T], figures [7, T] and, where a factor is given, the gradient of hidden."""
    tokens = hidden.shape[0]
    logprobs = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    figures = logprobs.new_empty(len(FIGURES), tokens)
    gradient = None if factor is None else torch.zeros_like(hidden)
    live = rows.weights != 0 if terms.always else (rows.weights != 0) & (rows.advantages != 0)
    buffer = logits_buffer(tokens, weight, head.chunk)
    for start, span in zip(range(0, tokens, head.chunk), live_spans(live, head.chunk), strict=True):
        # the whole chunk, so that log-probs are bit for bit those of `linear_logprob` over the same rows
        part = slice(start, min(start + head.chunk, tokens))
        states = hidden[part].to(weight.dtype)
        logits = logits_into(buffer[: len(states)], states, weight)
        softmax = head.softmax(logits, local[part], terms.bonus != 0.0)
        dtype = weight.dtype if gradient is not None and span.stop > span.start else None
        figures[:, part], d_logits = head.kernels.policy_rows(
            logits, local[part], head.columns, head.scale, softmax, rows[part], terms, factor or 0.0, dtype
        )
        logprobs[part] = softmax.logprob
        if gradient is not None and d_logits is not None:
            inner = slice(span.start - start, span.stop - start)
            gradient[span] = (d_logits[inner] @ weight).to(hidden.dtype)
            accumulate_weight_gradient(main_grad, d_logits[inner], states[inner])
    if gradient is not None and head.group is not None:
        dist.all_reduce(gradient, group=head.group)
    return logprobs, figures, gradient


class _Attach(torch.autograd.Function):
    """Hangs a gradient that exists already on the loss."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, loss: torch.Tensor, gradient: torch.Tensor, factor: float
    ) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        ctx.factor = factor
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        arrived, promised = float(grads[0]), ctx.factor
        if not abs(arrived - promised) <= _FACTOR_TOLERANCE * abs(promised):
            raise RuntimeError(
                f"the loss was scaled by {arrived}, and its gradients were written for a factor of {promised}; the "
                "weight's gradient is already in main_grad, so this step cannot be used"
            )
        return ctx.saved_tensors[0], None, None, None
