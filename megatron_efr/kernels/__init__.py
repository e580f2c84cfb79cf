"""Per-token log-probs, entropies, policy losses and credits without ever holding [tokens,
vocabulary].
"""

from megatron_efr.kernels.backend import Backend, choose_backend
from megatron_efr.kernels.fused_policy_loss import FusedLoss, fused_policy_loss
from megatron_efr.kernels.linear_logprob import default_chunk, linear_logprob
from megatron_efr.kernels.row_kernels import PolicyRows
from megatron_efr.kernels.token_credits import TokenCredits, token_credits
from megatron_efr.kernels.torch_rows import token_terms

__all__ = [
    "Backend",
    "FusedLoss",
    "PolicyRows",
    "TokenCredits",
    "choose_backend",
    "default_chunk",
    "fused_policy_loss",
    "linear_logprob",
    "token_credits",
    "token_terms",
]
