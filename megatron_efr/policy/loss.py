"""The losses, as functions of a micro-batch's rows at the head."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_efr.algorithms.objective import Objective
from megatron_efr.kernels import token_terms
from megatron_efr.kernels.row_kernels import refer_to_policy, sum_figures
from megatron_efr.policy.head import HeadRows
from megatron_efr.samples import PackedBatch

Metrics = dict[str, torch.Tensor]
"""Figures of one micro-batch: summed over micro-batches and replicas, or maximised if the name ends
in `_max`.
"""

MEANS = ("clip_fraction", "clip_above", "clip_below", "kl_to_old", "kl_to_reference", "entropy")
"""Figures that are means over tokens once they are divided by the sum of the weights."""

ROUNDING = 1e-4
"""Tolerance of the sum of fp32 weights that are to sum to 1."""

Loss = Callable[[HeadRows], tuple[torch.Tensor, Metrics]]
"""Asks for `policy_loss` if each token's log-prob is enough by itself, else for `logprobs`."""


def policy_loss(objective: Objective) -> Loss:
    """The loss of `Objective`: in one sweep if each token's log-prob is enough, else in two.

    Ratios are against the policy's own log-probs before its first update of the iteration, and of a
    token that a script chose against the chance of that; advantages and importance weights are
    constants. Figures, weighted as the loss is: `loss`, `clip_fraction`, `clip_above`,
    `clip_below`, `kl_to_old` (k1), `kl_to_reference` (if a KL is in the loss), `entropy`;
    `ratio_max` of tokens that are trained on; and `weight`, the sum of the weights. `kl_to_old` and
    `ratio_max` say how far the policy has moved, of chosen tokens too.
    """

    def loss(rows: HeadRows) -> tuple[torch.Tensor, Metrics]:
        if objective.ratio == "token":
            value, figures = rows.policy_loss(objective)
        else:
            value, figures = sequence_policy_loss(objective, rows)
        figures["weight"] = rows.batch.columns["weight"].sum()
        return value, figures

    return loss


def combine(figures: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sums, or maxima for names that end in `_max`, in a fixed order."""
    combined: dict[str, float] = {}
    for name in sorted({name for figure in figures for name in figure}):
        values = [float(figure[name]) for figure in figures if name in figure]
        combined[name] = max(values) if name.endswith("_max") else math.fsum(values)
    return combined


def as_means(figures: dict[str, float]) -> dict[str, float]:
    """An update's figures with those of MEANS divided by the sum of its weights, which is left out.

    A mean's weights sum to 1 but for rounding, and are left as they are; a constant divisor's and a
    method's own do not. If nothing was trained on, the sum is 0, and there is no entropy (nan).
    """
    weight = figures.pop("weight", 1.0)
    if weight == 0.0:
        return figures | {"entropy": math.nan}
    if abs(weight - 1.0) <= ROUNDING:
        return figures
    return figures | {name: figures[name] / weight for name in MEANS if name in figures}


def sequence_policy_loss(objective: Objective, rows: HeadRows) -> tuple[torch.Tensor, Metrics]:
    """Scalar loss of ratios of whole sequences (GSPO, Zheng et al. 2025), and its figures.

    Log-probs [R] come first, then their gradients.

    The backward pass makes the logits again, from the log of their sum that the first pass kept.
    """
    every = objective.every_token
    logprobs, entropies = rows.logprobs_and_entropies(None if every else rows.batch.live_rows)
    given = rows.given(objective)
    with torch.no_grad():
        log_ratio = sequence_means(logprobs - given.old, rows.batch, rows.head.context_group)
        terms, slope = token_terms(logprobs, log_ratio, entropies, given, objective)
        if given.before is not None:
            moved = sequence_means(logprobs - given.before, rows.batch, rows.head.context_group)
            refer_to_policy(terms, moved, given.weights)
        figures = sum_figures(terms, given.weights, objective)
    # the value is there; what autograd sees adds 0 to it, and has its gradient
    value = figures["loss"] + _nothing(given.weights * slope, logprobs)
    if objective.bonus != 0.0:
        value = value - objective.bonus * _nothing(given.weights, entropies)
    return value, figures


def sequence_means(
    values: torch.Tensor, batch: PackedBatch, context_group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Each row's mean [R] of values [R] over its whole sequence's trained tokens, 0 if there are
    none.

    The sequence's rows may be held by several context ranks.
    """
    lengths = torch.tensor(batch.row_lengths, dtype=torch.int64, device=values.device)
    sequence = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths)
    trained = batch.columns["weight"] > 0
    each = torch.stack([torch.where(trained, values, 0.0).double(), trained.double()])
    sums = torch.zeros(2, len(lengths), dtype=torch.float64, device=values.device).index_add_(
        1, sequence, each
    )
    if context_group is not None:
        dist.all_reduce(sums, group=context_group)
    return (sums[0] / sums[1].clamp(min=1.0))[sequence].float()


def _nothing(slope: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """0, with `slope` as its gradient by `values`."""
    return (slope * (values - values.detach())).sum()


def supervised_loss(rows: HeadRows) -> tuple[torch.Tensor, Metrics]:
    """Scalar loss: minus the weighted log-probs [R] of the response tokens."""
    value = -(rows.batch.columns["weight"] * rows.logprobs()).sum()
    return value, {"loss": value.detach()}


def weighted_likelihood(rows: HeadRows) -> tuple[torch.Tensor, Metrics]:
    """Scalar loss: minus log-probs [R], each times its advantage and weight, both constants."""
    columns = rows.batch.columns
    return -(columns["weight"] * columns["advantage"] * rows.logprobs()).sum(), {}
