"""Checkpoints as each Megatron-Core wrote them: a tiny policy after two updates, and what it was
and did next.

    python -m tests.recorded tests/data/checkpoints
        # under either; writes a folder named after the installed one

A folder holds a checkpoint for each optimizer, and `recorded.json`: SHA-256 of every weight and of
the optimizer's state as they were saved, and the figures of the two updates before and of the two
that followed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megatron_efr.checkpoint.checkpoints import Checkpoints, name
from megatron_efr.config import CheckpointConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_efr.policy import Policy, Ranks, join_ranks, supervised_loss
from tests.conftest import VOCAB, ragged_sequences

CHECKPOINTS = Path(__file__).with_name("data") / "checkpoints"
OPTIMIZERS = {"plain": {}, "distributed": {"use_distributed_optimizer": True}}
STEP = name(2)
QWEN2 = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": VOCAB,
    "hidden_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 12,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu", "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def build(folder: Path, ranks: Ranks, optimizer: str) -> Policy:
    """The policy, with the weights that it began with; `folder` gets its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(QWEN2))
    return Policy(
        ModelConfig(path=str(folder), init="random"), ParallelConfig(ddp=OPTIMIZERS[optimizer]),
        OptimizerConfig(lr=1e-2, schedule="cosine", warmup_updates=2, clip_grad=1.0), ranks,
        updates=6, seed=0,
    )  # fmt: skip


def update(policy: Policy, step: int) -> dict[str, float]:
    """The figures of update `step`."""
    batches = policy.pack_update(ragged_sequences(8, seed=step), list(range(8)), 300, "sequence")
    made = policy.update(batches, supervised_loss)
    return {key: made[key] for key in ("loss", "grad_norm", "lr")}


def held(policy: Policy) -> dict[str, Any]:
    """SHA-256 of each weight by name, and of each parameter's moments and step count in whatever
    order.
    """
    optimizer: Any = policy.optimizer.megatron.chained_optimizers[0].optimizer
    moments = [
        digest(*(state[key].float() for key in ("exp_avg", "exp_avg_sq", "step")))
        for state in optimizer.state.values()
    ]
    return {
        "weights": {name: digest(w) for name, w in policy.named_weights()},
        "optimizer": sorted(moments),
    }


def digest(*tensors: torch.Tensor) -> str:
    """SHA-256 over the tensors' bytes."""
    return hashlib.sha256(
        b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)
    ).hexdigest()


def main(out: str) -> None:
    place = Path(out) / f"megatron-core-{version('megatron-core')}"
    recorded = {}
    with join_ranks(ParallelConfig(), seed=0) as ranks:
        for optimizer in OPTIMIZERS:
            policy = build(place / "model", ranks, optimizer)
            before = [update(policy, step) for step in (1, 2)]
            checkpoints = Checkpoints(place / optimizer, CheckpointConfig(), ranks)
            initial = policy.initial_model | {"path": "model"}
            checkpoints.save(2, policy.sharded_state(), {"step": 2, "initial_model": initial})
            recorded[optimizer] = held(policy) | {
                "figures": before + [update(policy, step) for step in (3, 4)]
            }
    (place / "recorded.json").write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
