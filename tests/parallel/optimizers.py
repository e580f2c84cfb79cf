"""One rank of an optimizer run (launch.py): cases one after the other, trained or taken up.

python -m torch.distributed.run --nproc-per-node=2 -m tests.parallel.optimizers train|resume MODEL
OUT CASE CASE ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from megatron_efr.algorithms import Objective
from megatron_efr.checkpoint.checkpoints import Checkpoints
from megatron_efr.config import CheckpointConfig, ModelConfig, OptimizerConfig
from megatron_efr.policy import Policy, Ranks, join_ranks, policy_loss
from tests.conftest import ragged_sequences
from tests.parallel.layout import split

SAVED_AFTER, STEPS = 2, 3


class Case(NamedTuple):
    """One training: a layout, a precision, and how Megatron's DDP and optimizer are set up."""

    layout: str
    dtype: Literal["float32", "bfloat16"]
    ddp: tuple[str, ...]  # fields of Megatron's DDP configuration that are true
    offloaded: bool = False  # while the checkpoint is saved

    @property
    def name(self) -> str:
        words = [
            self.layout or "data",
            self.dtype,
            *self.ddp,
            *(["offloaded"] if self.offloaded else []),
        ]
        return "-".join(words).replace("=", "").replace(",", "-")


def build(case: Case, model: str, ranks: Ranks) -> Policy:
    # several buckets, the head's a different one from the layers': otherwise overlap would have
    # nothing to get wrong
    ddp: dict[str, Any] = {"bucket_size": 3000, **dict.fromkeys(case.ddp, True)}
    parallel = split(case.layout).model_copy(update={"ddp": ddp})
    # in bf16 what is smaller would not move the norms' weights, near 1
    lr = 1e-3 if case.dtype == "float32" else 2e-2
    optimizer = OptimizerConfig(
        lr=lr, warmup_updates=1, schedule="cosine", clip_grad=0.5, weight_decay=0.01
    )
    return Policy(
        ModelConfig(path=model, dtype=case.dtype), parallel, optimizer, ranks, updates=STEPS + 1,
        seed=0,
        keep_reference=True,
    )  # fmt: skip


def iterate(policy: Policy, step: int) -> dict[str, float]:
    """One update, after log-probs of the current and of the initial weights."""
    sequences = ragged_sequences(20, seed=step)
    batches = policy.pack_update(sequences, list(range(20)), 300, "sequence")
    policy.score(batches)
    drift = policy.compare_logprobs(batches)
    objective = Objective(kl="reward", beta=0.1)
    policy.fill_columns(batches, objective)
    return policy.update(batches, policy_loss(objective)) | drift


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.named_weights()}


def optimizer_state(policy: Policy) -> list[torch.Tensor]:
    """Every tensor of this rank's optimizer, in its order: master weight, moments, step."""
    return [
        tensor.detach().clone()
        for part in policy.optimizer.megatron.chained_optimizers
        for group in part.optimizer.param_groups
        for parameter in group["params"]
        for tensor in [
            parameter,
            *(part.optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq", "step")),
        ]
    ]


def train(case: Case, model: str, out: Path, ranks: Ranks) -> dict[str, Any]:
    """Three updates, with a checkpoint after the second."""
    policy = build(case, model, ranks)
    before = weights(policy)
    result: dict[str, Any] = {
        "metrics": [iterate(policy, step) for step in range(1, SAVED_AFTER + 1)]
    }
    result["saved"] = {"weights": weights(policy), "optimizer": optimizer_state(policy)}
    if case.offloaded:
        policy.offload_training_state()
    Checkpoints(out / case.name, CheckpointConfig(), ranks).save(
        SAVED_AFTER, policy.sharded_state(), {}
    )
    if case.offloaded:
        policy.restore_training_state()
    result["metrics"].append(iterate(policy, STEPS))
    result["gradients"] = {name: tensor.clone() for name, tensor in policy.named_gradients()}
    result["end"] = {"weights": weights(policy), "optimizer": optimizer_state(policy)}
    result["change"] = {
        name: tensor - before[name] for name, tensor in result["end"]["weights"].items()
    }
    return result


def resume(case: Case, model: str, out: Path, ranks: Ranks) -> dict[str, Any]:
    """The checkpoint, and the third update."""
    policy = build(case, model, ranks)
    checkpoints = Checkpoints(out / case.name, CheckpointConfig(), ranks)
    path = checkpoints.newest()
    assert path is not None
    sharded, _ = checkpoints.load(path, policy.sharded_state(loading=True))
    policy.load_sharded_state(sharded)
    result: dict[str, Any] = {
        "saved": {"weights": weights(policy), "optimizer": optimizer_state(policy)}
    }
    result["metrics"] = [iterate(policy, STEPS)]
    result["end"] = {"weights": weights(policy), "optimizer": optimizer_state(policy)}
    return result


def main(action: str, model: str, out: str, *cases: str) -> None:
    dist.init_process_group("gloo")
    for text in cases:
        case = Case(*json.loads(text))
        with join_ranks(split(case.layout), seed=0) as ranks:
            result = (train if action == "train" else resume)(case, model, Path(out), ranks)
            torch.save(result, Path(out) / f"{case.name}-{action}-{ranks.rank}.pt")
            ranks.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
