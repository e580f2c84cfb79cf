"""One rank (started by launch.py) that trains low-rank adapters under layouts, one after the other,
and saves each.

python -m torch.distributed.run --nproc-per-node=2 -m tests.parallel.adapters MODEL OUT tensor=2
pipeline=2
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model

from megatron_efr.checkpoint.checkpoints import Checkpoints
from megatron_efr.config import (
    CheckpointConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
)
from megatron_efr.policy import Policy, Ranks, join_ranks, supervised_loss
from megatron_efr.policy.lora import alpha_state
from tests.conftest import ragged_sequences
from tests.parallel.layout import folder, gathered, split

SGD = {"optimizer": "sgd", "sgd_momentum": 0.0}
# DDP's settings under which Adam trains; small buckets, so that the passes gather one after the
# other
ADAM: dict[str, dict[str, Any]] = {
    "plain": {},
    "overlapped": {
        "use_distributed_optimizer": True,
        "overlap_param_gather": True,
        "bucket_size": 3000,
    },
}


def train(model: str, parallel: ParallelConfig, ranks: Ranks, out: Path) -> dict[str, Any]:
    """Three updates: log-probs before the last, the base's beside them, its gradients, where it
    leads; a checkpoint.
    """
    policy = Policy(
        ModelConfig(path=model, lora=LoraConfig(rank=4, alpha=6.0)), parallel,
        OptimizerConfig(lr=1.0, clip_grad=0.0, megatron=SGD), ranks, updates=3, seed=0,
        keep_reference=True,
    )  # fmt: skip
    batches = policy.pack_update(ragged_sequences(16), list(range(16)), 200, "sequence")
    for _ in range(2):
        policy.update(batches, supervised_loss)
    policy.score(batches)
    result: dict[str, Any] = {"logprobs": gathered(batches, ranks)}
    for batch in batches:
        batch.columns["old_logprob"] = batch.columns["reference_logprob"]
    result["reference"] = gathered(batches, ranks)
    result["norm"] = policy.update(batches, supervised_loss)["grad_norm"]
    result["gradients"] = dict(policy.named_gradients())
    result["adapters"] = policy.parameters.adapter_tensors()
    result["weights"] = {name: tensor.clone() for name, tensor in policy.named_weights()}
    sharded: Any = {
        f"model{i}": unwrap_model(chunk).sharded_state_dict()
        for i, chunk in enumerate(policy.chunks)
    }
    # an SGD without momentum has no state to save
    sharded |= alpha_state(policy.model_config.lora, ranks.rank)
    Checkpoints(out, CheckpointConfig(), ranks).save(3, sharded, {"step": 3})
    return result


def train_by_adam(model: str, ddp: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Two updates in a row: nothing but the second's passes gathers what the first has changed."""
    policy = Policy(
        ModelConfig(path=model, lora=LoraConfig(rank=4, alpha=6.0)), ParallelConfig(ddp=ddp),
        OptimizerConfig(lr=1e-2, clip_grad=0.0), ranks, updates=2, seed=0,
    )  # fmt: skip
    batches = policy.pack_update(ragged_sequences(16), list(range(16)), 200, "sequence")
    losses = [policy.update(batches, supervised_loss)["loss"] for _ in range(2)]
    return {"losses": losses, "adapters": policy.parameters.adapter_tensors()}


def main(model: str, out: str, *layouts: str) -> None:
    """`layouts`: of the ranks, or names of `ADAM`."""
    dist.init_process_group("gloo")
    for layout in layouts:
        place = Path(out) / folder(layout)
        parallel = ParallelConfig() if layout in ADAM else split(layout)
        with join_ranks(parallel, seed=0) as ranks:
            result = (
                train_by_adam(model, ADAM[layout], ranks)
                if layout in ADAM
                else train(model, parallel, ranks, place)
            )
            if ranks.is_main:
                torch.save(result, place / "result.pt")
            ranks.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
