"""The row kernels in plain torch: the reference, and the path on CPU. The contract is `RowKernels` in rows.py."""

from __future__ import annotations

import torch

from megatron_efr.kernels.rows import Logits, PolicyRows, PolicyTerms, Softmax, Statistics


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
    # a logit of -inf adds nothing, where (-inf) * 0 would be nan
    moment = torch.where(exp > 0, shifted * exp, 0.0).sum(1) if entropy else torch.zeros_like(peak)
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
    terms: PolicyTerms,
    factor: float,
    dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The loss's terms, token by token, and their gradient."""
    zero = torch.zeros_like(softmax.logprob)
    log_ratio = softmax.logprob - rows.old
    ratio = log_ratio.exp()
    importance = torch.ones_like(zero) if terms.cap is None else _importance(rows, terms.cap)
    plain = ratio * rows.advantages
    clipped = ratio.clamp(1.0 - terms.clip, 1.0 + terms.clip) * rows.advantages
    loss = -importance * torch.minimum(plain, clipped)
    slope = torch.where(clipped < plain, 0.0, -importance * plain)  # d loss / d logprob; ratio' = ratio; nan stays
    kl, kl_slope = _kl(softmax.logprob, rows, terms)
    loss, slope = loss + terms.beta * kl, slope + terms.beta * kl_slope
    entropy = zero if softmax.entropy is None else softmax.entropy
    loss = loss - terms.bonus * entropy
    w = rows.weights
    clip_fraction = torch.where(clipped < plain, w, 0.0)
    figures = torch.stack([w * loss, clip_fraction, w * -log_ratio, w * kl, w * entropy, w * importance, ratio])
    if dtype is None:
        return figures, None
    grad_entropy = None if terms.bonus == 0.0 else -factor * terms.bonus * w
    return figures, write_gradient(logits, softmax, factor * w * slope, grad_entropy, dtype)


def _kl(logprob: torch.Tensor, rows: PolicyRows, terms: PolicyTerms) -> tuple[torch.Tensor, torch.Tensor]:
    """The KL's estimate and its derivative by the log-prob."""
    if terms.kl == "none":
        return torch.zeros_like(logprob), torch.zeros_like(logprob)
    assert rows.reference is not None
    d = rows.reference - logprob
    if terms.kl == "k1":
        return -d, torch.ones_like(d)
    if terms.kl == "k2":
        return 0.5 * d * d, -d
    return torch.expm1(d) - d, -torch.expm1(d)


def _importance(rows: PolicyRows, cap: float) -> torch.Tensor:
    assert rows.engine is not None
    return (rows.old - rows.engine).exp().clamp(max=cap)


def _scaled(values: torch.Tensor, scale: float) -> torch.Tensor:
    return values if scale == 1.0 else values * scale
