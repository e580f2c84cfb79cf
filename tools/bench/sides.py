"""The sides of cpu.py that are not TRL's: an iteration and a policy step of ours, and plain torch's
step.

Started by cpu.py as `sides.py NAME FOLDER`, one process each.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plain import serve_plain
from turns import Settings, serve, timed_steps

from megatron_efr.algorithms import Objective
from megatron_efr.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_efr.config.file import load
from megatron_efr.observe import Observer
from megatron_efr.policy import Policy, join_ranks, policy_loss
from megatron_efr.run.run import open_run
from megatron_efr.samples import Sample
from megatron_efr.train import iterate


def configuration(settings: Settings, folder: Path, turns: int) -> TrainConfig:
    """That of `settings`, alpha 0 as TRL's reward is, with its model and its problems."""
    overrides = {
        "runs": folder,
        "model.path": settings.model,
        "train.iterations": turns,
        "method.alpha": 0.0,
        "data.datasets": f"[{{path: {json.dumps(settings.train)}, difficulty: difficulty}}]",
    }
    given = [f"{key}={value}" for key, value in overrides.items()]
    return load(TrainConfig, Path(settings.config), [*given, *settings.overrides])


def serve_iteration(settings: Settings, folder: Path) -> None:
    """`efr train`'s own loop, one iteration and its publication a turn."""
    config = configuration(settings, folder, settings.iteration_turns + 1)
    with (
        open_run(config) as run,
        Observer(run.folder, config.observe, config.train.iterations, 0, 0) as observer,
    ):
        run.publisher.publish(run.policy, 0)
        steps = iter(range(1, config.train.iterations + 1))

        def work() -> dict[str, Any]:
            step, began = next(steps), time.perf_counter()
            metrics = iterate(run, step, observer)
            phases = {name: observer.seconds(name) for name in ("rollout", "logprobs", "train")}
            seconds = time.perf_counter() - began
            observer.log(step, metrics)
            return {
                "seconds": seconds,
                "phases": phases,
                "lengths": [metrics["tokens_mean"]],
                "accuracy": metrics["accuracy"],
            }

        serve(work)


def made(tokens: list[int], prompt: int, advantage: float) -> Sample:
    """A sequence of sequences.json."""
    return Sample(np.array(tokens), prompt, {"advantage": np.full(len(tokens) - prompt, advantage)})


def serve_policy(settings: Settings, folder: Path) -> None:
    """`Policy.update` on the batch that `folder` describes; leaves weights, batch and first
    gradients there.
    """
    given = json.loads((folder / "sequences.json").read_text())
    with join_ranks(ParallelConfig(), seed=1) as ranks:
        model = ModelConfig(path=given["model"], init=given["init"], dtype=given["dtype"])
        policy = Policy(
            model, ParallelConfig(), OptimizerConfig(lr=1e-4), ranks, updates=10_000, seed=1
        )
        # packed and scored as a run does it
        sequences = [made(*row) for row in given["sequences"]]
        batches = policy.pack_update(
            sequences, list(range(len(sequences))), given["micro_batch_tokens"], "sequence"
        )
        policy.score(batches)
        generator = torch.Generator().manual_seed(0)
        for batch in batches:  # ratios off 1: at 1 the loss would not depend on the model
            batch.columns["old_logprob"] += 0.1 * torch.randn(
                batch.columns["old_logprob"].shape, generator=generator
            )
        # what the other side needs to take the same step
        torch.save(
            {name: tensor.clone() for name, tensor in policy.named_weights()}, folder / "weights.pt"
        )
        torch.save([asdict(batch) for batch in batches], folder / "batches.pt")
        loss = policy_loss(Objective())

        # named_weights reads parameters, so gradients take their place for a moment
        def keep_gradients() -> None:
            parameters = [p for chunk in policy.chunks for p in chunk.parameters()]
            values = [p.data.clone() for p in parameters]
            for parameter in parameters:
                parameter.data.copy_(parameter.main_grad)  # pyright: ignore[reportAttributeAccessIssue]
            torch.save(
                {name: tensor.clone() for name, tensor in policy.named_weights()},
                folder / "ours.pt",
            )
            for parameter, value in zip(parameters, values, strict=True):
                parameter.data.copy_(value)

        serve(timed_steps(settings, lambda: policy.update(batches, loss)["loss"], keep_gradients))


SIDES = {"iteration": serve_iteration, "policy": serve_policy, "plain": serve_plain}


if __name__ == "__main__":
    torch.set_num_threads(1)
    side, folder = sys.argv[1], Path(sys.argv[2])
    SIDES[side](Settings(**json.loads((folder / "settings.json").read_text())), folder)
