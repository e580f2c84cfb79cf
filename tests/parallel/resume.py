"""One rank (started by launch.py) that saves checkpoints under some layouts and takes up others',
one after the other.

python -m torch.distributed.run --nproc-per-node=2 -m tests.parallel.resume MODELS OUT "save
pipeline=2" \
    "load tensor=2 from pipeline=2"
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from megatron_efr.checkpoint.checkpoints import Checkpoints
from megatron_efr.config import CheckpointConfig, ModelConfig, OptimizerConfig
from megatron_efr.policy import Policy, Ranks, join_ranks, supervised_loss
from tests.conftest import ragged_sequences
from tests.parallel.layout import folder, gathered, kind, split

UPDATES = [list(range(8)), list(range(8, 16)), list(range(16, 24))]
BEFORE = 2  # updates before the checkpoint; the rest follow it


def update(policy: Policy, number: int) -> dict[int, torch.Tensor]:
    """Make one update; the log-probs of its sequences before it."""
    batches = policy.pack_update(ragged_sequences(24), UPDATES[number], 200, "sequence")
    policy.score(batches)
    policy.update(batches, supervised_loss)
    return gathered(batches, policy.ranks)


def whole_state(policy: Policy) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and Adam's state as whole tensors by their Hugging Face names, on rank 0."""
    made = {"weights": {name: tensor.clone() for name, tensor in policy.named_weights()}}
    for field in ("exp_avg", "exp_avg_sq"):
        for part in policy.optimizer.megatron.chained_optimizers:
            for parameter, state in cast(Any, part).optimizer.state.items():
                # of the same shape, and gathered by the same way
                parameter.main_grad.copy_(state[field])
        made[field] = {name: tensor.clone() for name, tensor in policy.named_gradients()}
    return made


def go_on(policy: Policy) -> dict[str, Any]:
    """The state as it is, and what the next update makes of it."""
    result: dict[str, Any] = whole_state(policy)
    result["logprobs"] = update(policy, BEFORE)
    result["gradients"] = {name: tensor.clone() for name, tensor in policy.named_gradients()}
    result["change"] = {
        name: tensor - result["weights"][name] for name, tensor in policy.named_weights()
    }
    result["lr"] = policy.optimizer.lr
    return result


def run(
    models: str, out: Path, verb: str, layout: str, origin: str, ranks: Ranks
) -> dict[str, Any]:
    """Save after the first updates, or load what was saved under `origin`; then go on."""
    model = ModelConfig(path=f"{models}/{'moe' if kind(layout) == 'experts' else 'untied'}")
    if verb == "load":
        model = model.model_copy(update={"init": "random"})  # nothing may be left of it
    optimizer = OptimizerConfig(lr=1e-3, schedule="cosine", warmup_updates=2, clip_grad=0.0)
    policy = Policy(model, split(layout), optimizer, ranks, updates=2 * len(UPDATES), seed=7)
    checkpoints = Checkpoints(out / folder(origin), CheckpointConfig(), ranks)
    if verb == "save":
        for number in range(BEFORE):
            update(policy, number)
        checkpoints.save(BEFORE, policy.sharded_state(), {"step": BEFORE})
    else:
        path = checkpoints.newest()
        assert path is not None
        policy.load_sharded_state(checkpoints.load(path, policy.sharded_state(loading=True))[0])
    return go_on(policy)


def main(models: str, out: str, *asked: str) -> None:
    dist.init_process_group("gloo")
    for one in asked:
        verb, layout, *origin = one.replace(" from ", " ").split(" ")
        with join_ranks(split(layout), seed=0) as ranks:
            result = run(models, Path(out), verb, layout, origin[0] if origin else layout, ranks)
            if ranks.is_main:
                torch.save(result, Path(out) / f"{one}.pt")
            ranks.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
