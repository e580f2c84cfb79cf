"""From rank 0 to all: what the ranks train on, as a few flat tensors over gloo.

Every rank gets all of it, 8 bytes a token: which sequences are a replica's own follows, on every rank alike, from the
lengths of all (`packing.balance`), so a scatter would take a second round, and save little beside the rollout's time.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import numpy as np
import torch

from megatron_efr.policy.packing import trainable
from megatron_efr.policy.ranks import Ranks
from megatron_efr.types import Group, Sequence, VersionSpan


class FlatSequences(NamedTuple):
    """Sequences end to end.

    `sizes` int64 [n, 5]: tokens, prompt tokens, engine log-probs, spans, tokens with routed experts (-1: not known).
    `tokens` int32 [all tokens], `logprobs` fp32 [all engine log-probs], `spans` int64 [all spans, 3] (version, start,
    end), `advantages` fp64 [n], `routed_experts` [all tokens with them, layers, experts per token], integers of the
    engine's type.
    """

    sizes: torch.Tensor
    tokens: torch.Tensor
    logprobs: torch.Tensor
    spans: torch.Tensor
    advantages: torch.Tensor
    routed_experts: torch.Tensor


def flatten(sequences: SequenceOf[Sequence]) -> FlatSequences:
    """The sequences as tensors. Exact, log-probs being fp32 numbers as engines give them."""
    sizes = [
        (len(s.tokens), s.prompt_length, _count(s.engine_logprobs), len(s.versions), _count(s.routed_experts))
        for s in sequences
    ]
    routed = [s.routed_experts for s in sequences if s.routed_experts is not None]
    logprobs = [np.asarray(s.engine_logprobs or [], dtype=np.float32) for s in sequences]
    return FlatSequences(
        sizes=torch.tensor(sizes, dtype=torch.int64).reshape(-1, 5),
        tokens=_joined([np.asarray(s.tokens, dtype=np.int32) for s in sequences], np.int32),
        logprobs=_joined(logprobs, np.float32),
        spans=torch.tensor([span for s in sequences for span in s.versions], dtype=torch.int64).reshape(-1, 3),
        advantages=torch.tensor([s.advantage for s in sequences], dtype=torch.float64),
        routed_experts=torch.from_numpy(np.concatenate(routed)) if routed else torch.zeros(0, 1, 1, dtype=torch.uint8),
    )


def unflatten(flat: FlatSequences) -> list[Sequence]:
    """The sequences that `flatten` was given."""
    sizes = flat.sizes.tolist()
    tokens = flat.tokens.split([size[0] for size in sizes])
    logprobs = flat.logprobs.split([max(size[2], 0) for size in sizes])
    spans = flat.spans.split([size[3] for size in sizes])
    routed = flat.routed_experts.split([max(size[4], 0) for size in sizes])
    return [
        Sequence(
            tokens=tokens[i].tolist(),
            prompt_length=prompt,
            advantage=advantage,
            engine_logprobs=None if drawn < 0 else logprobs[i].tolist(),
            routed_experts=None if told < 0 else routed[i].numpy(),
            versions=tuple(VersionSpan(*span) for span in spans[i].tolist()),
        )
        for i, ((_, prompt, drawn, _, told), advantage) in enumerate(zip(sizes, flat.advantages.tolist(), strict=True))
    ]


def hand_over(groups: SequenceOf[Group], ranks: Ranks) -> list[Sequence]:
    """On every rank, the sequences to train on of rank 0's scored groups; the others' groups do not count."""
    if ranks.world_size == 1:
        return [sequence for group in groups for sequence in trainable(group)]
    mine = [sequence for group in groups for sequence in trainable(group)] if ranks.is_main else []
    return unflatten(FlatSequences(*ranks.broadcast(flatten(mine))))


def _count(values: list[float] | np.ndarray | None) -> int:
    return -1 if values is None else len(values)


def _joined(parts: list[np.ndarray], dtype: type[np.generic]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype), *parts]))
