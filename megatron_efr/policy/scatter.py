"""Scatters rank 0's samples to the replicas: each gets those that it trains on, as a few flat
tensors over gloo.

Which those are follows, on every rank alike, from the sizes of all (`packing.balance`). So sizes go
to everyone, and tokens, columns and routed experts, which may be gigabytes, only to the ranks that
train on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_efr.policy.packing import UpdateShares
from megatron_efr.policy.ranks import Ranks
from megatron_efr.samples import COLUMNS, Sample


def flatten(samples: Sequence[Sample]) -> list[torch.Tensor]:
    """The samples end to end, exactly.

    First int64 [n, 3 + columns]: tokens, prompt tokens, tokens with routed experts (-1: not known),
    and by column 1 if the sample has it. Then tokens int32 [all tokens], routed experts [all tokens
    with them, layers, experts per token] in the engine's integers, and each column [its response
    tokens], in the order of COLUMNS.
    """
    told = [-1 if s.routed_experts is None else len(s.routed_experts) for s in samples]
    routed = [s.routed_experts for s in samples if s.routed_experts is not None]
    sizes = [
        [s.length, s.prompt_length, count, *(int(name in s.columns) for name in COLUMNS)]
        for s, count in zip(samples, told, strict=True)
    ]
    columns = [
        _joined([s.column(name) for s in samples if name in s.columns], column.dtype)
        for name, column in COLUMNS.items()
    ]
    return [
        torch.tensor(sizes, dtype=torch.int64).reshape(-1, 3 + len(COLUMNS)),
        _joined([np.asarray(s.tokens, dtype=np.int32) for s in samples], np.int32),
        torch.from_numpy(np.concatenate(routed))
        if routed
        else torch.zeros(0, 1, 1, dtype=torch.uint8),
        *columns,
    ]


def unflatten(flat: Sequence[torch.Tensor]) -> list[Sample]:
    """The samples that `flatten` was given, from its tensors on the CPU."""
    sizes = flat[0].tolist()
    tokens = flat[1].split([size[0] for size in sizes])
    routed = flat[2].split([max(size[2], 0) for size in sizes])
    columns: list[dict[str, np.ndarray]] = [{} for _ in sizes]
    for c, (name, values) in enumerate(zip(COLUMNS, flat[3:], strict=True), start=3):
        having = [i for i, size in enumerate(sizes) if size[c]]
        parts = values.split([sizes[i][0] - sizes[i][1] for i in having])
        for i, part in zip(having, parts, strict=True):
            columns[i][name] = part.numpy()
    return [
        Sample(tokens[i].numpy(), prompt, columns[i], None if told < 0 else routed[i].numpy())
        for i, (_, prompt, told, *_) in enumerate(sizes)
    ]


def scatter_samples(
    samples: Sequence[Sample], plans: Sequence[UpdateShares], ranks: Ranks
) -> dict[int, Sample]:
    """Rank 0's `samples` that this rank's replica trains on, by index; others' do not count."""
    if ranks.world_size == 1:
        return dict(enumerate(samples))
    own = [[i for plan in plans for i in plan.own(replica)] for replica in range(ranks.replicas)]
    parts = [flatten([samples[i] for i in indices]) for indices in own] if ranks.is_main else []
    received = unflatten(ranks.scatter(parts))
    return dict(zip(own[ranks.replica], received, strict=True))


def _joined(parts: list[np.ndarray], dtype: type[np.generic]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype), *parts]))
