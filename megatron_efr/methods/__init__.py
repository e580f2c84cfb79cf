"""The paper's method and its family: each a small class that turns whole groups into rewards."""

from megatron_efr.methods.base import Method, available, build, credit
from megatron_efr.methods.efr import EFR, efr_rewards

__all__ = ["EFR", "Method", "available", "build", "credit", "efr_rewards"]
