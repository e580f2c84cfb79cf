"""The losses, as functions of log-probs [R] and a packed micro-batch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_efr.types import PackedBatch

Metrics = dict[str, torch.Tensor]
"""Figures of one micro-batch: summed over micro-batches and replicas, or maximised where the name ends in `_max`."""

Loss = Callable[[torch.Tensor, PackedBatch], tuple[torch.Tensor, Metrics]]


def clipped_policy_loss(clip: float) -> Loss:
    """PPO's clipped surrogate: -sum of w_t * rho_t * min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t).

    Schulman et al. 2017, eq. 7; ratio against the policy's own log-probs before its first update of the iteration.
    rho_t is `batch.importance` where there is one: a constant, for tokens that another policy drew.
    """

    def loss(logprobs: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, Metrics]:
        assert batch.old_logprobs is not None
        assert batch.advantages is not None
        log_ratio = logprobs - batch.old_logprobs
        ratio = log_ratio.exp()
        plain = ratio * batch.advantages
        clipped = ratio.clamp(1.0 - clip, 1.0 + clip) * batch.advantages
        weights = batch.weights if batch.importance is None else batch.weights * batch.importance
        value = -(weights * torch.minimum(plain, clipped)).sum()
        with torch.no_grad():
            metrics = {
                "loss": value.detach().clone(),
                "clip_fraction": (batch.weights * (clipped < plain)).sum(),
                "kl_to_old": (batch.weights * -log_ratio).sum(),
                "ratio_max": torch.cat([ratio, ratio.new_zeros(1)]).max(),  # an empty micro-batch has none
            }
        return value, metrics

    return loss


def supervised_loss(logprobs: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, Metrics]:
    """Negative log-likelihood of the response tokens."""
    value = -(batch.weights * logprobs).sum()
    return value, {"loss": value.detach().clone()}
