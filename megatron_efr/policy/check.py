"""Checks, before any rank joins, all that a policy would stop at while it is built."""

from __future__ import annotations

from megatron_efr.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_efr.policy.divisibility import check_fit
from megatron_efr.policy.model import ddp_config, transformer_config
from megatron_efr.policy.optimizer import optimizer_config
from megatron_efr.weights.architecture import Architecture


def check_policy(
    model: ModelConfig,
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
    architecture: Architecture,
) -> None:
    """ConfigError if the model does not divide over `parallel`, or Megatron refuses what is handed
    on to it.
    """
    check_fit(model, parallel, architecture)
    transformer_config(model, architecture, parallel)
    distributed = ddp_config(parallel).use_distributed_optimizer
    optimizer_config(optimizer, model.dtype, distributed)
