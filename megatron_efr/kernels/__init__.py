"""Per-token log-probs, entropies and policy losses without ever holding [tokens, vocabulary]."""

from megatron_efr.kernels.backend import Backend, choose_backend
from megatron_efr.kernels.linear_logprob import linear_logprob

__all__ = ["Backend", "choose_backend", "linear_logprob"]
