"""For tests of routing replay: a model to flip experts in, and experts drawn at random or recorded
from a policy.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from megatron.core.utils import unwrap_model
from safetensors.torch import load_file, save_file

from megatron_efr.policy import Policy
from megatron_efr.samples import Sample
from tests.families import make_family_folder


def make_moe_folder(folder: Path) -> Path:
    """A Qwen3-MoE whose sixteen experts have scores so close that a little noise swaps some, and
    that matters.
    """
    make_family_folder(
        folder, "qwen3-moe", num_hidden_layers=4, num_experts=16, num_experts_per_tok=4
    )
    return change_weights(
        folder, folder, lambda name, w: w * (0.1 if name.endswith("mlp.gate.weight") else 1.0)
    )


def change_weights(
    source: Path, destination: Path, change: Callable[[str, torch.Tensor], torch.Tensor]
) -> Path:
    """A copy of a model folder with every weight changed."""
    destination.mkdir(exist_ok=True)
    weights = load_file(source / "model.safetensors")
    save_file(
        {name: change(name, weight) for name, weight in weights.items()},
        destination / "model.safetensors",
    )
    (destination / "config.json").write_bytes((source / "config.json").read_bytes())
    return destination


def randomly_routed(
    sequences: list[Sample], layers: int, experts: int, per_token: int
) -> list[Sample]:
    """The sequences with experts that no router would choose: what puts one in a wrong place shows
    up.
    """
    rng = np.random.default_rng(7)
    return [
        replace(
            s,
            routed_experts=rng.random((s.length - 1, layers, experts))
            .argsort(-1)[..., :per_token]
            .astype("i1"),
        )
        for s in sequences
    ]


def as_sampled_by(
    policy: Policy, sequences: SequenceOf[Sample], budget: int = 600
) -> tuple[list[Sample], list[torch.Tensor]]:
    """The sequences with the experts that this policy of one process chooses for itself, and their
    log-probs.
    """
    assert policy.architecture.experts is not None
    chosen: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda *call: chosen.append(_by_rank(call[-1], policy)))
        for chunk in policy.chunks
        for name, module in cast(torch.nn.Module, unwrap_model(chunk)).named_modules()
        if name.endswith("mlp.router")
    ]
    batches = policy.pack_update(sequences, list(range(len(sequences))), budget, "sequence")
    logprobs = policy.logprobs(batches)
    for hook in hooks:
        hook.remove()
    routed: dict[int, np.ndarray] = {}
    found: dict[int, torch.Tensor] = {}
    for b, batch in enumerate(batches):
        layers = policy.architecture.layers
        whole = torch.stack(chosen[b * layers : (b + 1) * layers], dim=1).numpy()
        for i, start in zip(batch.indices, batch.cu_seqlens.tolist(), strict=False):
            routed[i] = whole[start : start + sequences[i].length - 1]
        found |= dict(zip(batch.indices, logprobs[b].split(batch.row_lengths), strict=True))
    order = range(len(sequences))
    return [replace(sequences[i], routed_experts=routed[i]) for i in order], [
        found[i] for i in order
    ]


def _by_rank(routing: Any, policy: Policy) -> torch.Tensor:
    """A router's (weights, choice), both [tokens, experts], as the chosen experts [tokens, k], the
    heaviest first.
    """
    assert policy.architecture.experts is not None
    weights, choice = routing
    return (
        weights.masked_fill(~choice, -1.0)
        .topk(policy.architecture.experts.per_token)
        .indices.to(torch.int8)
    )
