"""Megatron's optimizer and learning-rate schedule, from the run's own configuration."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_efr.config import OptimizerConfig
from megatron_efr.policy import cpu
from megatron_efr.policy.model import DTYPES, check_fields

# the form that any other layout can read
_CHECKPOINT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


class Optimizer:
    """Steps Megatron's Adam along the schedule; a step whose gradient is not finite is skipped and says so."""

    def __init__(
        self, config: OptimizerConfig, dtype: str, updates: int, chunks: list[DistributedDataParallel]
    ) -> None:
        check_fields("optimizer.megatron", config.megatron, MegatronOptimizerConfig)
        fields: dict[str, Any] = {
            "optimizer": "adam",
            "lr": config.lr,
            "min_lr": config.min_lr,
            "weight_decay": config.weight_decay,
            "adam_beta1": config.beta1,
            "adam_beta2": config.beta2,
            "adam_eps": config.eps,
            "clip_grad": config.clip_grad,
            "bf16": dtype == "bfloat16",
            "params_dtype": DTYPES[dtype],
            "use_distributed_optimizer": chunks[0].ddp_config.use_distributed_optimizer,
        }
        self._chunks = chunks
        with cpu.cuda_type_names():
            made = get_megatron_optimizer(MegatronOptimizerConfig(**fields | config.megatron), list(chunks))
        self.megatron = cast(ChainedOptimizer, made)
        self.schedule = OptimizerParamScheduler(
            self.megatron,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.min_lr,
            lr_warmup_steps=config.warmup_updates,
            lr_decay_steps=max(updates, config.warmup_updates + 1),
            lr_decay_style=config.schedule,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=max(updates, 1),
            wd_incr_style="constant",
        )

    @property
    def lr(self) -> float:
        """The learning rate of the last update."""
        return float(self.megatron.param_groups[0]["lr"])

    def zero_grad(self) -> None:
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    @torch.no_grad()
    def step(self) -> tuple[bool, float]:
        """One update with the gradients at hand: whether it was made, and the gradient's norm before clipping.

        The schedule moves first, so the first of k warm-up updates has lr / k, not 0.
        """
        with cpu.cuda_type_names():
            self.megatron.prepare_grads()
            norm = float(self.megatron.get_grad_norm())
            if not math.isfinite(norm):
                return False, norm
            self.schedule.step(1)
            for part in self.megatron.chained_optimizers:
                parameters = cast(list[torch.Tensor], part.get_parameters())
                if part.config.clip_grad > 0 and parameters:
                    clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm)
            return bool(self.megatron.step_with_ready_grads()), norm

    def sharded_state(self, models: dict[str, Any], loading: bool) -> dict[str, Any]:
        """The optimizer's part of a sharded checkpoint, given the models'."""
        with cpu.cuda_type_names():
            return {
                "state": self.megatron.sharded_state_dict(models, is_loading=loading, metadata=_CHECKPOINT),
                "schedule": self.schedule.state_dict(),
            }

    def load_sharded_state(self, state: dict[str, Any]) -> None:
        with cpu.cuda_type_names():
            self.megatron.load_state_dict(self._in_our_form(state["state"]))
        self.schedule.load_state_dict(state["schedule"])

    def _in_our_form(self, loaded: dict[Any, Any]) -> dict[Any, Any]:
        """What was loaded, as our optimizers take it, whichever way the ranks that saved it were split.

        Megatron gives experts that are split over ranks an optimizer of their own, so what a checkpoint says beside
        its tensors comes in another form with `parallel.expert` > 1 than without. None of that is the checkpoint's to
        say but the number of steps: the configuration has the rest, and the schedule sets the learning rate.
        """
        ours = self.megatron.chained_optimizers
        if self._chunks[0].ddp_config.use_distributed_optimizer:
            return loaded
        parts = [loaded] if len(ours) == 1 else [loaded[i] for i in range(len(ours))]
        steps = _find(loaded, "common_step")
        for part, optimizer in zip(parts, ours, strict=True):
            inner = part.get("optimizer", part)  # bf16 keeps its fp32 weights beside it
            groups = zip(cast(Any, optimizer).optimizer.param_groups, inner["param_groups"], strict=True)
            inner["param_groups"] = [{**group, "params": saved["params"]} for group, saved in groups]
            if steps is not None:
                inner["state"]["common_step"] = steps
        return parts[0] if len(parts) == 1 else dict(enumerate(parts))


def _find(tree: Any, key: str) -> Any:
    """The first value of `key` in nested dictionaries, None where there is none."""
    if not isinstance(tree, dict):
        return None
    if key in tree:
        return tree[key]
    return next((found for value in tree.values() if (found := _find(value, key)) is not None), None)
