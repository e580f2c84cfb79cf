"""Megatron's optimizer and learning-rate schedule, from the run's own configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    USING_PYTORCH_OPTIMIZER,
    ChainedOptimizer,
    get_megatron_optimizer,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_efr.config import ConfigError, OptimizerConfig
from megatron_efr.policy import cpu, optimizer_state
from megatron_efr.policy.model import DTYPES
from megatron_efr.policy.settings import made

# the form that any other layout can read
_CHECKPOINT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


class Optimizer:
    """Steps Megatron's Adam along the schedule; a step whose gradient is not finite is skipped and
    says so.

    `skipped_in_a_row`: how many of the last steps were skipped, over resumes too.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        dtype: str,
        updates: int,
        chunks: list[DistributedDataParallel],
    ) -> None:
        settings = optimizer_config(config, dtype, chunks[0].ddp_config.use_distributed_optimizer)
        self.skipped_in_a_row = 0
        self._chunks = chunks
        self._on_device = True
        with cpu.cuda_type_names():
            made = get_megatron_optimizer(settings, list(chunks))
        self.megatron = cast(ChainedOptimizer, made)
        for part in self.megatron.chained_optimizers:
            optimizer_state.prepare(part)
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
        self._require_on_device("zero gradients")
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    @torch.no_grad()
    def step(self) -> tuple[bool, float]:
        """One update with the gradients at hand: whether it was made, and the gradient's norm
        before clipping.

        The schedule moves first, so the first of k warm-up updates has lr / k, not 0.
        """
        with cpu.cuda_type_names():
            self.megatron.prepare_grads()
            norm = float(self.megatron.get_grad_norm())
            if not math.isfinite(norm):
                self.skipped_in_a_row += 1
                return False, norm
            self.skipped_in_a_row = 0
            self.schedule.step(1)
            for part in self.megatron.chained_optimizers:
                parameters = cast(list[torch.Tensor], part.get_parameters())
                if part.config.clip_grad > 0 and parameters:
                    decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                    clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm, decoupled)
            return bool(self.megatron.step_with_ready_grads()), norm

    def gather_gradients(self) -> None:
        """Make every `main_grad` whole: the distributed optimizer leaves each replica the sum of
        its own share only.
        """
        if not self._chunks[0].ddp_config.use_distributed_optimizer:
            return
        for chunk in self._chunks:
            for group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
                peers: dist.ProcessGroup = group.intra_distributed_optimizer_instance_group
                for bucket in group.buckets:
                    shares = list(bucket.grad_data.chunk(peers.size()))
                    # a copy, since its own share is also written
                    dist.all_gather(shares, shares[peers.rank()].clone(), group=peers)

    # -- leaving the GPU between phases
    # -------------------------------------------------------------------------------

    def offload(self) -> None:
        """Free the gradients' memory on the device and move the optimizer's state to the host's,
        until `restore`.

        The model's weights stay. An fp32 model's are the optimizer's own, or it holds views of
        them, which Megatron would part from them.
        """
        self._require_on_device("offload")
        for chunk in self._chunks:
            chunk.offload_grad_buffers()
        weights = {
            parameter.untyped_storage().data_ptr()
            for chunk in self._chunks
            for parameter in chunk.parameters()
        }
        parameters = cast(list[torch.Tensor], self.megatron.get_parameters())
        staying = [(p, p.data) for p in parameters if p.untyped_storage().data_ptr() in weights]
        self.megatron.offload_to_cpu()
        for parameter, data in staying:
            parameter.data = data
        self._on_device = False

    def restore(self) -> None:
        """Undo `offload`: the same state, gradients zero. RuntimeError if nothing was offloaded."""
        if self._on_device:
            raise RuntimeError(
                "restore: gradients and optimizer state have not been offloaded; they are in place"
            )
        for chunk in self._chunks:
            chunk.restore_grad_buffers()
        self.megatron.restore_from_cpu()
        for part in self.megatron.chained_optimizers:
            optimizer_state.steps_to_host(part)
        self._on_device = True

    def _require_on_device(self, action: str) -> None:
        if not self._on_device:
            raise RuntimeError(
                f"{action}: gradients and optimizer state have been offloaded; restore them first"
            )

    # -- checkpoints
    # ----------------------------------------------------------------------------------------------

    def sharded_state(self, models: dict[str, Any], loading: bool) -> dict[str, Any]:
        """The optimizer's part of a sharded checkpoint, given the models'. Offloaded, it is saved
        from host memory.
        """
        if loading:
            self._require_on_device("load the optimizer")
        # over gloo: the other way takes as much of the device as its engine has left
        metadata = _CHECKPOINT | {
            "distrib_optim_fully_reshardable_mem_efficient": not self._on_device
        }
        with cpu.cuda_type_names():
            return {
                "state": self.megatron.sharded_state_dict(
                    models, is_loading=loading, metadata=metadata
                ),
                "schedule": self.schedule.state_dict(),
                "skipped_in_a_row": self.skipped_in_a_row,
            }

    def load_sharded_state(self, state: dict[str, Any]) -> None:
        parts = self.megatron.chained_optimizers
        saved = self._in_our_form(state["state"])
        by_part = [saved] if len(parts) == 1 else [saved[i] for i in range(len(parts))]
        tensors = [
            optimizer_state.set_aside(part, mine) for part, mine in zip(parts, by_part, strict=True)
        ]
        with cpu.cuda_type_names():
            self.megatron.load_state_dict(saved)
        for part, mine in zip(parts, tensors, strict=True):
            if mine is not None:
                optimizer_state.put_tensors(cast(DistributedOptimizer, part), mine)
            optimizer_state.fuse(part)
        self.schedule.load_state_dict(state["schedule"])
        self.skipped_in_a_row = state["skipped_in_a_row"]

    def _in_our_form(self, loaded: dict[Any, Any]) -> dict[Any, Any]:
        """Arrange what was loaded as our optimizers take it, whichever way the ranks that saved it
        were split.

        Megatron gives experts that are split over ranks an optimizer of their own, so what a
        checkpoint says beside its tensors comes in another form with `parallel.expert` > 1 than
        without. None of that is the checkpoint's to say but the number of steps: the configuration
        has the rest, and the schedule sets the learning rate.
        """
        ours = self.megatron.chained_optimizers
        if self._chunks[0].ddp_config.use_distributed_optimizer:
            return loaded
        parts = [loaded] if len(ours) == 1 else [loaded[i] for i in range(len(ours))]
        steps = _find(loaded, "common_step")
        for part, optimizer in zip(parts, ours, strict=True):
            inner = part.get("optimizer", part)  # bf16 keeps its fp32 weights beside it
            groups = zip(
                cast(Any, optimizer).optimizer.param_groups, inner["param_groups"], strict=True
            )
            inner["param_groups"] = [
                {**group, "params": saved["params"]} for group, saved in groups
            ]
            if steps is not None:
                inner["state"]["common_step"] = steps
        return parts[0] if len(parts) == 1 else dict(enumerate(parts))


def optimizer_config(
    config: OptimizerConfig, dtype: str, distributed: bool
) -> MegatronOptimizerConfig:
    """Megatron's settings of Adam, `distributed` over data-parallel ranks or not;
    `optimizer.megatron` overrides any.

    ConfigError for what Megatron would refuse, or stop at in the middle of a run.
    """
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
        "use_distributed_optimizer": distributed,
    }
    _check(fields | config.megatron, dtype)
    return made(MegatronOptimizerConfig, fields, "optimizer.megatron", config.megatron)


def _check(fields: Mapping[str, Any], dtype: str) -> None:
    """ConfigError for what Megatron's optimizers would stop at, in the middle of a run, without a
    word.
    """
    where = "optimizer.megatron"
    if fields["use_distributed_optimizer"] and fields["optimizer"] != "adam":
        raise ConfigError(
            f"{where}.optimizer: Megatron's distributed optimizer knows adam only, not "
            f"{fields['optimizer']!r}; leave it out, or set "
            "parallel.ddp.use_distributed_optimizer: false"
        )
    if not fields.get("optimizer_cpu_offload"):
        return
    needed = {
        "a GPU": torch.cuda.is_available(),
        "Transformer Engine (the package's gpu extra)": not USING_PYTORCH_OPTIMIZER,
        "parallel.ddp.use_distributed_optimizer: true": fields["use_distributed_optimizer"],
        f"{where}.use_precision_aware_optimizer: true": fields.get(
            "use_precision_aware_optimizer", False
        ),
        f"{where}.optimizer_offload_fraction above 0 (1.0 offloads all)": fields.get(
            "optimizer_offload_fraction", 0.0
        ),
        "model.dtype: bfloat16": dtype == "bfloat16",
    }
    if missing := [what for what, there in needed.items() if not there]:
        raise ConfigError(
            f"{where}.optimizer_cpu_offload: Megatron's offloading also needs {'; '.join(missing)}"
        )


def _find(tree: Any, key: str) -> Any:
    """The first value of `key` in nested dictionaries, None if there is none."""
    if not isinstance(tree, dict):
        return None
    if key in tree:
        return tree[key]
    return next(
        (found for value in tree.values() if (found := _find(value, key)) is not None), None
    )
