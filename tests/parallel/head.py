"""The fused head inside Megatron against logits that are all there and autograd: one rank (started
by launch.py).

python -m torch.distributed.run --nproc-per-node=2 -m tests.parallel.head MODELS OUT "tensor=2"
"pipeline=2" ...
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
)

from megatron_efr.algorithms import Objective
from megatron_efr.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_efr.policy import Policy, Ranks, join_ranks, policy_loss
from megatron_efr.policy.head import HeadRows
from megatron_efr.policy.loss import Loss
from megatron_efr.samples import PackedBatch, Sample
from tests.conftest import ragged_sequences
from tests.groups import with_columns
from tests.parallel.layout import RECOMPUTE, split

CLIP = 0.2
SEQUENCES = 12


class Case(NamedTuple):
    """One way to run Megatron; CASES hold every pair of values."""

    tied: bool
    overlap: bool  # of gradient reduction with the backward pass
    several: bool  # at least 3 micro-batches
    averaged: bool  # `calculate_per_token_loss` off: Megatron divides by micro-batches and ranks
    scale: float  # of the loss
    recompute: bool


PLAIN = Case(False, False, False, False, 1.0, False)
CASES = [
    PLAIN,
    Case(True, True, True, True, 1024.0, False),
    Case(True, True, True, False, 1.0, True),
    Case(True, False, False, True, 1024.0, True),
    Case(False, True, False, True, 1.0, True),
    Case(False, False, True, False, 1024.0, False),
]


def sequences() -> list[Sample]:
    """A third of them of advantage 0."""
    return [
        with_columns(s, advantage=0.0) if i % 3 == 1 else s
        for i, s in enumerate(ragged_sequences(SEQUENCES))
    ]


def build(case: Case, models: str, parallel: ParallelConfig, ranks: Ranks, **model: Any) -> Policy:
    """With chunks so small that sequences begin and end inside them."""
    megatron = {"calculate_per_token_loss": not case.averaged} | (
        RECOMPUTE if case.recompute else {}
    )
    parallel = parallel.model_copy(update={"ddp": {"overlap_grad_reduce": case.overlap}})
    path = f"{models}/{'tied' if case.tied else 'untied'}"
    policy = Policy(
        ModelConfig(path=path, megatron=megatron, head_chunk_tokens=7, **model), parallel,
        OptimizerConfig(lr=1e-3, clip_grad=0.0), ranks, updates=1, seed=0,
    )  # fmt: skip
    policy.config.grad_scale_func = lambda loss: loss * case.scale
    return policy


def batches(policy: Policy, case: Case) -> list[PackedBatch]:
    """One update; old log-probs are off by more than the clip here and there."""
    found = policy.pack_update(
        sequences(), list(range(SEQUENCES)), 110 if case.several else 10_000, "sequence"
    )
    if case.several:
        assert len(found) >= 3
    policy.score(found)
    for batch in found:
        batch.columns["old_logprob"] = (
            batch.columns["old_logprob"] + 0.3 * (batch.columns["old_logprob"] * 40).sin()
        )
    policy.fill_columns(found, Objective())
    return found


def materialised(rows: HeadRows) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's clipped loss from all logits of all tensor ranks."""
    head, batch = rows.head, rows.batch
    states = (
        rows.states if head.sequence_parallel else copy_to_tensor_model_parallel_region(rows.states)
    )
    logits = gather_from_tensor_model_parallel_region(F.linear(states, head.weight))[
        :, : head.vocab
    ]
    log_probs = torch.log_softmax(logits.float() / head.temperature, -1)
    logprobs = log_probs.gather(1, batch.targets[:, None])[:, 0]
    ratio = (logprobs - batch.columns["old_logprob"]).exp()
    plain = ratio * batch.columns["advantage"]
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP) * batch.columns["advantage"]
    value = -(batch.columns["weight"] * torch.minimum(plain, clipped)).sum()
    figures = {
        "loss": value,
        "clip_fraction": (batch.columns["weight"] * (clipped < plain)).sum(),
        "clip_above": (batch.columns["weight"] * ((clipped < plain) & (ratio > 1))).sum(),
        "clip_below": (batch.columns["weight"] * ((clipped < plain) & (ratio < 1))).sum(),
        "entropy": -(batch.columns["weight"] * (log_probs.exp() * log_probs).sum(-1)).sum(),
        "kl_to_old": (batch.columns["weight"] * (batch.columns["old_logprob"] - logprobs)).sum(),
        "ratio_max": torch.cat([ratio, ratio.new_zeros(1)]).max(),
    }
    return value, {name: figure.detach().clone() for name, figure in figures.items()}


def gradients(
    policy: Policy, case: Case, loss: Loss
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Of one update, the loss scale taken out again; and the update's metrics."""
    metrics = policy.update(batches(policy, case), loss)
    del metrics["imbalance"], metrics["grad_norm"]  # the split's own; the scale is in the norm
    return {name: gradient / case.scale for name, gradient in policy.named_gradients()}, metrics


def compare(case: Case, models: str, parallel: ParallelConfig, ranks: Ranks) -> dict[str, float]:
    """Each gradient's distance from that of a plain run with all logits, relative to its norm; the
    metrics' as well.
    """
    plain = PLAIN._replace(tied=case.tied)
    want, wanted_metrics = gradients(build(plain, models, parallel, ranks), plain, materialised)
    got, metrics = gradients(build(case, models, parallel, ranks), case, policy_loss(Objective()))
    assert metrics.keys() == wanted_metrics.keys()
    apart = {
        name: float((got[name] - gradient).norm() / gradient.norm())
        for name, gradient in want.items()
    }
    return apart | {name: abs(metrics[name] - value) for name, value in wanted_metrics.items()}


def main(models: str, out: str, *layouts: str) -> None:
    dist.init_process_group("gloo")
    for number, layout in enumerate(layouts):
        with join_ranks(split(layout), seed=0) as ranks:
            apart = {case: compare(case, models, split(layout), ranks) for case in CASES}
            if ranks.is_main:
                torch.save(
                    {tuple(case): values for case, values in apart.items()},
                    Path(out) / f"{number}.pt",
                )
            ranks.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
