"""The training pass in one sweep over token chunks: loss, figures and gradients from logits that
exist once.

Three matrix products; a recomputing backward pass needs four. Chunk by chunk: fp32 logits into one
buffer, row statistics, their merge over tensor parallelism, then the loss and, over the logits
themselves, their gradient; then the gradients of hidden and weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_efr.algorithms.objective import Objective
from megatron_efr.kernels.backend import Backend
from megatron_efr.kernels.linear_logprob import Shard, logits_buffer, prepare
from megatron_efr.kernels.matmul import accumulate_weight_gradient
from megatron_efr.kernels.row_kernels import (
    FIGURES,
    PolicyRows,
    chunks,
    refer_to_policy,
    sum_figures,
)

_FACTOR_TOLERANCE = 1e-6  # fp32 products of the same factors in another order


class FusedLoss(NamedTuple):
    """`loss` is differentiable in hidden and weight; `logprobs` fp32 [T] and `figures` (fp32
    scalars) are not.

    Figures are sums of weight times term, `ratio_max` the largest ratio; those of terms that are
    off are left out.
    """

    loss: torch.Tensor
    logprobs: torch.Tensor
    figures: dict[str, torch.Tensor]


class _Gradients(NamedTuple):
    """Gradients that one sweep writes, times `factor`.

    `hidden` [T, H] is written; `weight`, fp32 [V_local, H], is added to; None if the weight is
    frozen.
    """

    hidden: torch.Tensor
    weight: torch.Tensor | None
    factor: float


def fused_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    rows: PolicyRows,
    objective: Objective,
    *,
    factor: float,
    main_grad: torch.Tensor | None = None,
    temperature: float = 1.0,
    true_vocab: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sum_hidden: bool = True,
    chunk: int | None = None,
    live: int | None = None,
    backend: Backend = "torch",
) -> FusedLoss:
    """Sum over rows of weights * `Objective`, its figures, and, in the same pass, its gradients.

    `hidden` [T, H], `weight` [V_local, H], `targets` int64 [T], `sum_hidden` as in
    `linear_logprob`; `rows` fp32 [T] each. Rows from `live` on have advantage (or weight) 0, as the
    caller knows: their figures are made, and their gradients' products left out if no KL or entropy
    gives them one.

    If gradients are on they are written times `factor`, what the caller will scale the loss by
    afterwards (loss scale, divisions by micro-batches or tokens); RuntimeError in the backward
    pass, which looks at one number, if another factor arrives. The gradient of `weight` is added to
    `main_grad` (fp32 [V_local, H]) at once, and autograd gets none. Without a `main_grad` it is
    gathered in an fp32 tensor of its own, and autograd gets it, in the weight's type. Under no_grad
    nothing is written. ValueError for a `main_grad` that is not fp32, a KL whose reference is
    missing, or a ratio that one token's log-prob does not give.
    """
    _check(weight, rows, objective, main_grad)
    shard, local = prepare(
        weight, targets, temperature, true_vocab, tp_group, sum_hidden, chunk, backend
    )
    # gradients are written in this pass, if autograd wants them
    gradients = None
    if torch.is_grad_enabled() and hidden.requires_grad:
        total = main_grad
        if total is None and weight.requires_grad:
            total = torch.zeros_like(weight, dtype=torch.float32)
        gradients = _Gradients(
            torch.zeros_like(hidden), total if total is None else total.detach(), factor
        )
    # one sweep over token chunks: log-probs, figures, gradients
    with torch.no_grad():
        tokens = len(hidden) if live is None or objective.every_token else live
        plain = rows.plain()
        logprobs, figures = _sweep(
            hidden, weight, local, plain, objective, shard, gradients, tokens
        )
        if plain.before is not None:
            refer_to_policy(figures, logprobs - plain.before, plain.weights)
        sums = sum_figures(figures, plain.weights, objective)
    # hang them on the loss, for the backward pass to hand on
    loss = sums["loss"]
    if gradients is not None:
        held = gradients.weight if main_grad is None else None
        weight_gradient = None if held is None else held.to(weight.dtype)
        loss = _Attach.apply(hidden, weight, loss, gradients.hidden, weight_gradient, factor)
    return FusedLoss(loss, logprobs, sums)


def _check(
    weight: torch.Tensor, rows: PolicyRows, objective: Objective, main_grad: torch.Tensor | None
) -> None:
    if main_grad is not None and (
        main_grad.dtype != torch.float32 or main_grad.shape != weight.shape
    ):
        raise ValueError(
            f"main_grad is {main_grad.dtype} {tuple(main_grad.shape)}; the head adds to an fp32 "
            f"{tuple(weight.shape)} (Megatron: grad_reduce_in_fp32)"
        )
    if objective.loss_kl != "none" and rows.reference is None:
        raise ValueError(f"kl {objective.loss_kl} needs the reference's log-probs")
    if objective.ratio != "token":
        raise ValueError(
            f"a ratio by {objective.ratio} needs all of its log-probs first: two passes, not this "
            "one"
        )


def _sweep(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    rows: PolicyRows,
    objective: Objective,
    shard: Shard,
    gradients: _Gradients | None,
    live: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [T] and figures [8, T]; `gradients`, if given, are filled from the first `live`
    rows.
    """
    tokens = hidden.shape[0]
    logprobs = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    figures = logprobs.new_empty(len(FIGURES), tokens)
    buffer = logits_buffer(tokens, weight, shard.chunk)
    # whole chunks, dead rows too, so that log-probs are bit for bit those of `linear_logprob` over
    # the same rows
    for part in chunks(tokens, shard.chunk):
        states = hidden[part].to(weight.dtype)
        logits = shard.logits(buffer, states, weight, targets[part])
        softmax = shard.softmax(logits, True)
        count = min(live, part.stop) - part.start  # of this chunk's rows that have a gradient
        dtype = weight.dtype if gradients is not None and count > 0 else None
        factor = 0.0 if gradients is None else gradients.factor
        figures[:, part], d_logits = shard.kernels.policy_rows(
            logits, softmax, rows[part], objective, factor, dtype
        )
        logprobs[part] = softmax.logprob
        if gradients is not None and d_logits is not None:
            gradients.hidden[part.start : part.start + count] = (d_logits[:count] @ weight).to(
                hidden.dtype
            )
            if gradients.weight is not None:
                accumulate_weight_gradient(gradients.weight, d_logits[:count], states[:count])
    if gradients is not None:
        shard.sum_hidden(gradients.hidden)
    return logprobs, figures


class _Attach(torch.autograd.Function):
    """Hangs gradients that exist already on the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        loss: torch.Tensor,
        hidden_gradient: torch.Tensor,
        weight_gradient: torch.Tensor | None,
        factor: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.factor = factor
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        arrived = float(grads[0])
        promised = ctx.factor
        if not abs(arrived - promised) <= _FACTOR_TOLERANCE * abs(promised):
            raise RuntimeError(
                f"the loss was scaled by {arrived}, and its gradients were written for a factor "
                f"of {promised}: they are wrong, and this step cannot be used"
            )
        return *ctx.saved_tensors, None, None, None, None
