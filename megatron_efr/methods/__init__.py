"""The paper's method and its family: each one class of options, with the hooks that make rewards of
groups.
"""

from megatron_efr.methods.base import Ask, Known, Method, Needs, State, Visit
from megatron_efr.methods.crediting import credit, reward
from megatron_efr.methods.efr import EFR, efr_rewards
from megatron_efr.methods.function import rewards
from megatron_efr.methods.given import Given, check_given
from megatron_efr.methods.history import Seen
from megatron_efr.methods.knowledge import Knowledge
from megatron_efr.methods.plain import Outcomes, Plain
from megatron_efr.methods.registry import METHODS, build, resolved
from megatron_efr.methods.samplings import Monitor, Sampled, Samplings
from megatron_efr.methods.together import check_together

__all__ = [
    "EFR",
    "METHODS",
    "Ask",
    "Given",
    "Knowledge",
    "Known",
    "Method",
    "Monitor",
    "Needs",
    "Outcomes",
    "Plain",
    "Sampled",
    "Samplings",
    "Seen",
    "State",
    "Visit",
    "build",
    "check_given",
    "check_together",
    "credit",
    "efr_rewards",
    "resolved",
    "reward",
    "rewards",
]
