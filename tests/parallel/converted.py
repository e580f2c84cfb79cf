"""One rank (started by launch.py) that loads a converted checkpoint under a layout, compares, and
saves it again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core.utils import unwrap_model
from transformers import AutoModelForCausalLM

from megatron_efr.checkpoint.checkpoints import Checkpoints
from megatron_efr.config import CheckpointConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_efr.policy import Policy, join_ranks
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import FolderWeights
from tests.conftest import ragged_sequences


def main(model: str, converted: str, out: str, layout: str) -> None:
    parallel = ParallelConfig(
        **{k: int(v) for k, v in (item.split("=") for item in layout.split(","))}
    )  # type: ignore[arg-type]
    sequences = ragged_sequences(6)
    with join_ranks(parallel, seed=0) as ranks:
        start = ModelConfig(path=model, init="random")
        policy = Policy(start, parallel, OptimizerConfig(lr=1e-3), ranks, updates=1, seed=0)
        chunk: Any = unwrap_model(policy.chunks[0])
        checkpoints = Checkpoints(Path(out), CheckpointConfig(keep=1), ranks)
        loaded, _ = checkpoints.load(Path(converted), {"model0": chunk.sharded_state_dict()})
        chunk.load_state_dict(loaded["model0"])
        source = FolderWeights(model, Architecture.from_folder(model))
        for name, tensor in policy.named_weights():
            assert not ranks.is_main or torch.equal(tensor, source[name]), name
        batches = policy.pack_update(sequences, list(range(6)), 10_000, "sequence")
        found = dict(
            zip(
                batches[0].indices,
                policy.logprobs(batches)[0].split(batches[0].row_lengths),
                strict=True,
            )
        )
        reference = AutoModelForCausalLM.from_pretrained(model)
        for i in found:  # this replica's
            sequence = sequences[i]
            with torch.no_grad():
                logits = reference(torch.tensor([sequence.tokens])).logits[
                    0, sequence.prompt_length - 1 : -1
                ]
            targets = torch.tensor(sequence.tokens[sequence.prompt_length :])
            wanted = torch.log_softmax(logits, -1).gather(1, targets[:, None])
            assert float((found[i] - wanted[:, 0]).abs().max()) <= 1e-5
        checkpoints.save(
            1, policy.sharded_state(), {"step": 1, "initial_model": policy.initial_model}
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
