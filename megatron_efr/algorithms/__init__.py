"""Algorithms as values: how rewards become credits, and the one objective that loss and kernels
execute.
"""

from megatron_efr.algorithms.base import Algorithm
from megatron_efr.algorithms.baselines import rloo
from megatron_efr.algorithms.objective import Importance, Objective, Spread
from megatron_efr.algorithms.registry import ALGORITHMS, build, resolved

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Importance",
    "Objective",
    "Spread",
    "build",
    "resolved",
    "rloo",
]
