"""Per-token log-probs and entropies without ever holding [tokens, vocabulary]."""

from megatron_efr.kernels.linear_logprob import linear_logprob

__all__ = ["linear_logprob"]
