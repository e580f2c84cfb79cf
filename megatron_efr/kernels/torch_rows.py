"""The row kernels in plain torch: the reference, and the path on CPU. The contract is `RowKernels` in rows.py."""

from __future__ import annotations

import torch

from megatron_efr.algorithms.objective import Objective
from megatron_efr.kernels.rows import Logits, PolicyRows, Softmax, Statistics

_LOWEST = -1e30


def statistics(logits: Logits, entropy: bool) -> Statistics:
    """Peak, sums and target of each row."""
    z = _scaled(logits.values[:, : logits.columns].float(), logits.scale)
    if not logits.columns:  # this rank holds nothing but padding
        zero = z.new_zeros(len(z))
        return Statistics(torch.full_like(zero, -torch.inf), zero, zero, zero)
    peak = z.max(dim=1).values
    target = z.gather(1, logits.targets.clamp(min=0)[:, None])[:, 0]
    shifted = z - peak[:, None]
    exp = shifted.exp()
    # in one sweep, since every training step takes it; a logit of -inf adds nothing, where (-inf) * 0 would be nan
    moment = torch.linalg.vecdot(shifted.clamp_(min=_LOWEST), exp) if entropy else torch.zeros_like(peak)
    return Statistics(peak, exp.sum(1), moment, target)


def write_gradient(
    logits: Logits,
    softmax: Softmax,
    grad_logprob: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """d logprob = onehot - p and d entropy = -p (log p + entropy), each times what comes in, over temperature."""
    work = logits.values.float()  # the very memory, where it is fp32
    work[:, logits.columns :] = 0.0
    z = work[:, : logits.columns]
    log_p = z.mul_(logits.scale).sub_(softmax.peak[:, None]).sub_(softmax.log_total[:, None])
    p = log_p.exp()
    live = grad_logprob != 0
    gradient = p.mul(-grad_logprob[:, None])
    if grad_entropy is not None:
        assert softmax.entropy is not None
        live |= grad_entropy != 0
        term = torch.where(p > 0, p * (log_p + softmax.entropy[:, None]), 0.0)
        gradient -= grad_entropy[:, None] * term
    if logits.columns:
        owned = torch.where(logits.targets >= 0, grad_logprob, 0.0)
        gradient.scatter_add_(1, logits.targets.clamp(min=0)[:, None], owned[:, None])
    z.copy_(_scaled(gradient, logits.scale).masked_fill_(~live[:, None], 0.0))
    return work.to(dtype)


def policy_rows(
    logits: Logits,
    softmax: Softmax,
    rows: PolicyRows,
    objective: Objective,
    factor: float,
    dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The loss's terms, token by token, and their gradient."""
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
    """FIGURES [8, rows], and each row's derivative of the unweighted loss by its log-prob, entropy left out.

    A row of weight 0 adds exactly 0, whatever it holds: nobody trains it, so nobody has looked. `log_ratio` is the
    token's own, or its sequence's; the ratio's derivative is the ratio in both cases.
    """
    ratio = log_ratio.exp()
    value, slope, cut = _surrogate(logprob, ratio, rows.advantages, objective)
    if rows.importance is not None:
        value, slope = rows.importance * value, rows.importance * slope
    kl, kl_slope = _kl(logprob, rows, objective)
    loss, slope = objective.beta * kl - value, objective.beta * kl_slope - slope
    measured = torch.zeros_like(logprob) if entropy is None else entropy
    if objective.bonus != 0.0:
        loss = loss - objective.bonus * measured
    above, below = cut & (ratio > 1.0), cut & (ratio < 1.0)
    terms = torch.stack([loss, cut.float(), above.float(), below.float(), -log_ratio, kl, measured])
    trained = rows.weights != 0.0
    weighted = torch.where(trained, rows.weights * terms, 0.0)
    return torch.cat([weighted, ratio[None]]), torch.where(trained, slope, 0.0)


def _surrogate(
    logprob: torch.Tensor, ratio: torch.Tensor, advantages: torch.Tensor, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is maximised, its derivative by the log-prob, and where a bound has changed either; nan stays nan."""
    bounded = ratio.clamp(1.0 - objective.low, 1.0 + objective.high)
    if objective.surrogate == "reweight":
        slope = bounded * advantages
        return slope * logprob, slope, bounded != ratio
    plain, clipped = ratio * advantages, bounded * advantages
    value, cut = torch.minimum(plain, clipped), clipped < plain
    if objective.dual is not None:
        least = torch.where(advantages < 0, objective.dual * advantages, -torch.inf)
        value, cut = torch.maximum(value, least), cut | (value < least)
    return value, torch.where(cut, 0.0, plain), cut


def _kl(logprob: torch.Tensor, rows: PolicyRows, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
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


def _scaled(values: torch.Tensor, scale: float) -> torch.Tensor:
    return values if scale == 1.0 else values * scale
