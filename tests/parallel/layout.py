"""One rank of a parity run (started by launch.py): layouts one after the other, each with every
case, results in files.

python -m torch.distributed.run --nproc-per-node=2 -m tests.parallel.layout MODELS OUT "tensor=2"
"pipeline=2" ...
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from megatron_efr.algorithms import Objective, Spread
from megatron_efr.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_efr.policy import Policy, Ranks, join_ranks, policy_loss
from megatron_efr.samples import Sample
from tests.conftest import ragged_sequences
from tests.groups import with_columns
from tests.routing import randomly_routed

RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
# the last update has a single sequence: replicas, context ranks and stages go without
UPDATES = [list(range(20)), list(range(20, 31)), [31]]
STEPS = 3


class Case(NamedTuple):
    """Training in a layout; the cases together cover every pair of values."""

    model: str
    objective: str
    recompute: bool
    budget: int  # tokens of a micro-batch, if there are several ranks
    replay: bool = False  # tokens go to experts drawn at random, as if an engine had chosen them
    # tokens have credits and weights of their own; many, and whole sequences, are not trained
    weighed: bool = False


# every aggregation, every KL, both ratios and surrogates, whitening, both bounds, the dual one, an
# entropy bonus
OBJECTIVES = {
    "sequence": Objective(kl="reward", beta=0.1, tokens=Spread()),
    "token": Objective(
        kl="k1",
        beta=0.05,
        surrogate="reweight",
        low=1.0,
        high=0.2,
        aggregate="token",
        tokens=Spread("sample", "variance"),
    ),
    "constant": Objective(kl="k3", beta=0.1, aggregate="constant", high=0.28, dual=2.0, bonus=0.01),
    "whole": Objective(kl="k2", beta=0.1, ratio="sequence", low=0.02, high=0.03, bonus=0.01),
}
CASES = {
    "dense": [
        Case("tied", "sequence", False, 300),
        Case("tied", "token", True, 150, weighed=True),
        Case("untied", "constant", True, 150),
        Case("untied", "whole", False, 150, weighed=True),
    ],
    "experts": [
        Case("moe", "sequence", False, 300),
        Case("moe", "token", True, 150),
        Case("moe", "sequence", True, 150, replay=True),
        Case("moe", "token", False, 300, replay=True),
    ],
}


def split(layout: str) -> ParallelConfig:
    """`tensor=2,sequence=true` as a configuration."""
    fields = dict(item.split("=") for item in layout.split(",") if item)
    return ParallelConfig(
        **{k: v == "true" if k == "sequence" else int(v) for k, v in fields.items()}
    )  # type: ignore[arg-type]


def folder(layout: str) -> str:
    """The name for what a layout writes."""
    return layout.replace("=", "").replace(",", "-") or "data"


def kind(layout: str) -> str:
    """Cases that a layout runs: `expert=` (1 too) asks for the mixture of experts."""
    return "experts" if "expert" in layout else "dense"


def weighed(sequences: list[Sample]) -> list[Sample]:
    """The sequences with credits and weights of single tokens: a third of these is 0, and every
    sixth's all are.
    """
    rng, made = np.random.default_rng(11), []
    for i, s in enumerate(sequences):
        weight = (
            rng.random(s.response_length) * (rng.random(s.response_length) < 0.7) * (i % 6 != 3)
        )
        credit = s.columns["advantage"] + 0.5 * rng.normal(size=s.response_length)
        made.append(with_columns(s, weight=weight, advantage=credit))
    return made


def train(
    case: Case, models: str, parallel: ParallelConfig, ranks: Ranks, optimizer: str
) -> dict[str, Any]:
    """Three updates: log-probs before them, each gradient after the first, the change of weights,
    all metrics.

    Deliberately unlike a good run, so that all of the loss works: ratios that clip, a reference far
    away, whitening.
    """
    sequences = weighed(ragged_sequences(32)) if case.weighed else ragged_sequences(32)
    if case.replay:
        sequences = randomly_routed(sequences, layers=4, experts=4, per_token=2)
    megatron = {"optimizer": "sgd", "sgd_momentum": 0.0} if optimizer == "sgd" else {}
    model = ModelConfig(
        path=f"{models}/{case.model}",
        routing="replay" if case.replay else "own",
        megatron=RECOMPUTE if case.recompute else {},
    )
    # large steps: the change of a weight is known to half a last bit of the weight itself. With
    # unlikely experts the gradient triples after such a step, and so does what rounding does to the
    # next one; so it is with one ratio for a whole sequence
    objective = OBJECTIVES[case.objective]
    gentle = case.replay or objective.ratio == "sequence"
    lr = (4.0 if optimizer == "sgd" else 1e-3) * (0.25 if gentle else 1.0)
    policy = Policy(
        model, parallel, OptimizerConfig(lr=lr, clip_grad=0.0, megatron=megatron),
        ranks, updates=STEPS, seed=0, keep_reference=True,
    )  # fmt: skip
    before = {name: tensor.clone() for name, tensor in policy.named_weights()}
    # one process takes each update as one pack
    budget = case.budget if ranks.world_size > 1 else 100_000
    updates = [
        policy.pack_update(sequences, update, budget, objective.aggregate) for update in UPDATES
    ]
    batches = [batch for update in updates for batch in update]
    policy.score(batches)
    result: dict[str, Any] = {"logprobs": gathered(batches, ranks), "metrics": []}
    result["metrics"].append(policy.compare_logprobs(batches))
    for batch in batches:  # a reference that differs, or the KL would add nothing
        reference = batch.columns["reference_logprob"]
        batch.columns["reference_logprob"] = reference + 0.1 * reference.sin()
    policy.fill_columns(batches, objective)
    for update in updates:
        result["metrics"].append(policy.update(update, policy_loss(objective)))
        del result["metrics"][-1]["imbalance"]  # the split's own
        if "gradients" not in result:
            result["gradients"] = {
                name: tensor.clone() for name, tensor in policy.named_gradients()
            }
    # what storing a weight in fp32 once may take from its change
    result["rounding"] = {name: float(tensor.norm()) * 2.0**-24 for name, tensor in before.items()}
    result["change"] = {name: tensor - before[name] for name, tensor in policy.named_weights()}
    return result


def gathered(batches: list[Any], ranks: Ranks) -> dict[int, torch.Tensor]:
    """Each sequence's log-probs, from whichever replica has them."""
    mine = {
        i: part.cpu()
        for batch in batches
        for i, part in zip(
            batch.indices, batch.columns["old_logprob"].split(batch.row_lengths), strict=True
        )
    }
    everyone: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(everyone, mine, group=ranks.cpu_world)
    return {i: part for table in everyone for i, part in table.items()}


def main(models: str, out: str, *layouts: str) -> None:
    dist.init_process_group("gloo")
    for number, layout in enumerate(layouts):
        parallel = split(layout)
        with join_ranks(parallel, seed=0) as ranks:
            results = {
                (tuple(case), optimizer): train(case, models, parallel, ranks, optimizer)
                for case in CASES[kind(layout)]
                for optimizer in ("sgd", "adam")
            }
            if ranks.is_main:
                torch.save(results, Path(out) / f"{number}.pt")
            ranks.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
