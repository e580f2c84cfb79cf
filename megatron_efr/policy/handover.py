"""From rank 0 to the replicas: the sequences that each trains on, as a few flat tensors over gloo.

Which those are follows, on every rank alike, from the sizes of all (`packing.balance`). So sizes go to everyone, and
tokens, log-probs and routed experts, which may be gigabytes, to those alone that train on them.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import numpy as np
import torch

from megatron_efr.policy.packing import UpdatePlan
from megatron_efr.policy.ranks import Ranks
from megatron_efr.types import Sequence, VersionSpan


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


def hand_over(sequences: SequenceOf[Sequence], plans: SequenceOf[UpdatePlan], ranks: Ranks) -> dict[int, Sequence]:
    """Those of rank 0's `sequences` that this rank's replica trains on, by index; other ranks' do not count."""
    if ranks.world_size == 1:
        return dict(enumerate(sequences))
    own = [[i for plan in plans for i in plan.own(replica)] for replica in range(ranks.replicas)]
    parts = [flatten([sequences[i] for i in indices]) for indices in own] if ranks.is_main else []
    received = unflatten(FlatSequences(*ranks.scatter(parts)))
    return dict(zip(own[ranks.replica], received, strict=True))


def _count(values: list[float] | np.ndarray | None) -> int:
    return -1 if values is None else len(values)


def _joined(parts: list[np.ndarray], dtype: type[np.generic]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype), *parts]))
