"""Per-token log-probs, entropies and policy losses without ever holding [tokens, vocabulary]."""

from megatron_efr.kernels.backend import Backend, choose_backend
from megatron_efr.kernels.fused_policy_loss import FusedLoss, fused_policy_loss
from megatron_efr.kernels.group_advantages import GroupAdvantages, group_advantages
from megatron_efr.kernels.linear_logprob import CHUNK_TOKENS, linear_logprob
from megatron_efr.kernels.rows import PolicyRows, PolicyTerms

__all__ = [
    "CHUNK_TOKENS",
    "Backend",
    "FusedLoss",
    "GroupAdvantages",
    "PolicyRows",
    "PolicyTerms",
    "choose_backend",
    "fused_policy_loss",
    "group_advantages",
    "linear_logprob",
]
