"""Small policies for tests, of a model folder, with what nobody's test is about left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_efr.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_efr.policy import Policy, Ranks


def make_policy(
    path: str | Path,
    ranks: Ranks,
    parallel: ParallelConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    *,
    updates: int = 1,
    temperature: float = 1.0,
    keep_reference: bool = False,
    **model: Any,
) -> Policy:
    """A policy of the model at `path`, seed 0; `model` are other keys of its section.

    Without `parallel` it is on this rank alone; without `optimizer` its learning rate is 1e-3.
    """
    return Policy(
        ModelConfig(path=str(path), **model),
        parallel or ParallelConfig(),
        optimizer or OptimizerConfig(lr=1e-3),
        ranks,
        updates=updates,
        seed=0,
        temperature=temperature,
        keep_reference=keep_reference,
    )
