"""The losses, as functions of a micro-batch's rows at the head."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_efr.kernels import PolicyTerms
from megatron_efr.policy.head import HeadRows

Metrics = dict[str, torch.Tensor]
"""Figures of one micro-batch: summed over micro-batches and replicas, or maximised where the name ends in `_max`."""

Loss = Callable[[HeadRows], tuple[torch.Tensor, Metrics]]
"""Asks for `policy_loss` where each token's log-prob is enough by itself, else for `logprobs`."""


def clipped_policy_loss(clip: float) -> Loss:
    """PPO's clipped surrogate: -sum of w_t * rho_t * min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t).

    Schulman et al. 2017, eq. 7; ratio against the policy's own log-probs before its first update of the iteration.
    rho_t is `batch.importance` where there is one: a constant, for tokens that another policy drew.
    Figures: `loss`, `clip_fraction`, `kl_to_old` (k1), `ratio_max`.
    """
    terms = PolicyTerms(clip)
    return lambda rows: rows.policy_loss(terms)


def supervised_loss(rows: HeadRows) -> tuple[torch.Tensor, Metrics]:
    """Negative log-likelihood of the response tokens."""
    value = -(rows.batch.weights * rows.logprobs()).sum()
    return value, {"loss": value.detach()}
