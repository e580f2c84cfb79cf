"""The policy: a Megatron-Core model that gives log-probs, takes updates, and lends its weights."""

import megatron_efr.transformer_engine  # noqa: F401 - before Megatron

# isort: split
from megatron_efr.policy.check import check_policy
from megatron_efr.policy.divisibility import check_fit
from megatron_efr.policy.loss import policy_loss, supervised_loss, weighted_likelihood
from megatron_efr.policy.packing import split_into_updates
from megatron_efr.policy.policy import Policy
from megatron_efr.policy.ranks import Ranks, join_ranks

__all__ = [
    "Policy",
    "Ranks",
    "check_fit",
    "check_policy",
    "join_ranks",
    "policy_loss",
    "split_into_updates",
    "supervised_loss",
    "weighted_likelihood",
]
