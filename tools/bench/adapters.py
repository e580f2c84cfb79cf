"""Measures low-rank adapters beside training all weights: bytes by counting tensors, CPU seconds of
an update.

    python tools/bench/adapters.py [--rank R]

Both sides take turns in one process, on one thread, with the same batch. CPU seconds and not the
clock's: another process on the machine lengthens only the latter.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_efr.algorithms import Objective
from megatron_efr.config import LoraConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_efr.policy import Policy, Ranks, join_ranks, policy_loss
from megatron_efr.samples import PackedBatch, Sample

SHAPE = {
    "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
    "vocab_size": 8192,
    "hidden_size": 576, "num_hidden_layers": 4, "num_attention_heads": 9, "num_key_value_heads": 3,
    "intermediate_size": 1536, "tie_word_embeddings": True, "max_position_embeddings": 8192,
}  # fmt: skip
"""Four layers of SmolLM2-135M's widths, with a sixth of its vocabulary."""

MIB = 2**20


class Side:
    """A policy that trains all weights, or adapters, and its batch."""

    def __init__(
        self, path: str, lora: LoraConfig | None, ranks: Ranks, rows: int, length: int
    ) -> None:
        self.policy = Policy(
            ModelConfig(path=path, init="random", lora=lora), ParallelConfig(),
            OptimizerConfig(lr=1e-5), ranks,
            updates=100, seed=0, keep_reference=True,
        )  # fmt: skip
        rng = np.random.default_rng(0)
        rewards = {"advantage": np.ones(length - 32)}
        samples = [
            Sample(rng.integers(0, SHAPE["vocab_size"], length), 32, rewards) for _ in range(rows)
        ]
        self.batches: list[PackedBatch] = self.policy.pack_update(
            samples, list(range(rows)), rows * length, "token"
        )
        self.policy.score(self.batches)
        self.seconds: dict[str, list[float]] = {"log-probs": [], "update": []}

    def turn(self) -> None:
        """One scoring (policy and reference) and one update, timed."""
        for name, act in (
            ("log-probs", lambda: self.policy.score(self.batches)),
            ("update", lambda: self.policy.update(self.batches, policy_loss(Objective()))),
        ):
            began = time.process_time()
            act()
            self.seconds[name].append(time.process_time() - began)

    def bytes(self) -> dict[str, int]:
        """Bytes of tensors by what they are for."""
        chunk: Any = self.policy.chunks[0]
        parts: Any = self.policy.optimizer.megatron.chained_optimizers
        states = [
            t for part in parts for state in part.optimizer.state.values() for t in state.values()
        ]
        reference: Any = self.policy._reference
        return {
            "weights, adapters": sum(p.nbytes for p in chunk.parameters()),
            "gradients": sum(buffer.grad_data.nbytes for buffer in chunk.buffers),
            "optimizer state": sum(t.nbytes for t in states),
            "reference": sum(t.nbytes for t in reference._waiting or []),
        }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: the table that docs/lora.md keeps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    given = parser.parse_args(argv)
    # one thread, so that CPU seconds are the work and not the waiting
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, join_ranks(ParallelConfig(), seed=0) as ranks:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")
        lora = LoraConfig(rank=given.rank, alpha=2.0 * given.rank)
        full, adapters = (
            Side(folder, each, ranks, given.rows, given.length) for each in (None, lora)
        )
        # alternating turns: what the machine does besides meets both sides
        for _ in range(given.turns + 1):
            full.turn()
            adapters.turn()
        held = full.bytes(), adapters.bytes()
        print("| | all weights | adapters | ratio |\n|---|---:|---:|---:|")
        for name in held[0]:
            one, other = (each[name] / MIB for each in held)
            print(f"| {name}, MiB | {one:.1f} | {other:.1f} | {other / one:.2f} |")
        # the sum: what a card would have to hold
        one, other = (sum(each.values()) / MIB for each in held)
        print(f"| together, MiB | {one:.1f} | {other:.1f} | {other / one:.2f} |")
        for name in full.seconds:
            # the first turn warms up
            one, other = (min(side.seconds[name][1:]) for side in (full, adapters))
            print(f"| {name}, CPU seconds | {one:.2f} | {other:.2f} | {other / one:.2f} |")


if __name__ == "__main__":
    main()
