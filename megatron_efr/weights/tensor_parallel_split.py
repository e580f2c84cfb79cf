"""Cuts of a Megatron parameter over tensor-parallel ranks, and the way back to Hugging Face:

    whole   the same on every rank                  column  split by rows (dim 0)
    row     split by columns (dim 1)                vocab   rows, padded to divide over the ranks
    qkv     per KV group [q.., k, v], then dim 0    gate_up [gate; up], each half split by rows
    grouped_gate_up, grouped_row
        the same, of several experts, transposed and in one tensor

With fewer KV groups than ranks Megatron-Core 0.16.1 splits `qkv` like any other and gathers it in
the forward pass (`SelfAttention.get_query_key_value_tensors`), so there is no case for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from megatron_efr.weights.architecture import Architecture

Split = Literal[
    "whole", "column", "row", "vocab", "qkv", "gate_up", "grouped_gate_up", "grouped_row"
]


class Cut(NamedTuple):
    """The model that is cut, and over how many ranks; `experts`: how many of each layer's a rank
    holds.
    """

    architecture: Architecture
    ranks: int
    experts: int


def padded_vocab(vocab: int, tensor_ranks: int) -> int:
    """`vocab` rounded up so that every tensor-parallel rank holds the same multiple of 8 rows."""
    multiple = 8 * tensor_ranks
    return -(-vocab // multiple) * multiple


def _group(cut: Cut, parts: list[torch.Tensor]) -> torch.Tensor:
    """q, k, v to [kv groups, rows of one group, ...]."""
    groups = cut.architecture.kv_heads
    return torch.cat([part.reshape(groups, -1, *part.shape[1:]) for part in parts], dim=1)


def _slice(tensor: torch.Tensor, dim: int, rank: int, ranks: int) -> torch.Tensor:
    return tensor.chunk(ranks, dim=dim)[rank]


def _qkv_to_megatron(cut: Cut, parts: list[torch.Tensor], rank: int) -> torch.Tensor:
    return _slice(_group(cut, parts).flatten(0, 1), 0, rank, cut.ranks)


def _gate_up_to_megatron(cut: Cut, parts: list[torch.Tensor], rank: int) -> torch.Tensor:
    return torch.cat([_slice(part, 0, rank, cut.ranks) for part in parts])


def _vocab_to_megatron(cut: Cut, parts: list[torch.Tensor], rank: int) -> torch.Tensor:
    (whole,) = parts
    missing = padded_vocab(cut.architecture.vocab, cut.ranks) - whole.shape[0]
    padded = torch.cat([whole, whole.new_zeros(missing, whole.shape[1])]) if missing else whole
    return _slice(padded, 0, rank, cut.ranks)


def _qkv_to_hugging_face(cut: Cut, shards: list[torch.Tensor]) -> list[torch.Tensor]:
    a = cut.architecture
    whole = _rows(shards)
    grouped = whole.reshape(a.kv_heads, -1, *whole.shape[1:])
    sizes = [a.heads // a.kv_heads * a.head_dim, a.head_dim, a.head_dim]
    return [part.flatten(0, 1) for part in grouped.split(sizes, dim=1)]


def _gate_up_to_hugging_face(cut: Cut, shards: list[torch.Tensor]) -> list[torch.Tensor]:
    halves = [shard.chunk(2) for shard in shards]
    if len(halves) == 1:
        return list(halves[0])
    return [torch.cat([half[i] for half in halves]) for i in range(2)]


def _grouped_gate_up_to_megatron(cut: Cut, parts: list[torch.Tensor], rank: int) -> torch.Tensor:
    # gate and up of each expert in turn; GroupedMLP multiplies from the right, and its [hidden,
    # ...] is but a shape
    pairs = zip(parts[::2], parts[1::2], strict=True)
    experts = [_gate_up_to_megatron(cut, list(pair), rank).T for pair in pairs]
    return torch.stack(experts).reshape(cut.architecture.hidden, -1)


def _grouped_gate_up_to_hugging_face(cut: Cut, shards: list[torch.Tensor]) -> list[torch.Tensor]:
    each = [
        shard.reshape(cut.experts, cut.architecture.hidden, -1).transpose(1, 2) for shard in shards
    ]
    return [
        part
        for e in range(cut.experts)
        for part in _gate_up_to_hugging_face(cut, [x[e] for x in each])
    ]


def _grouped_row_to_megatron(cut: Cut, parts: list[torch.Tensor], rank: int) -> torch.Tensor:
    return torch.cat([_slice(part, 1, rank, cut.ranks).T for part in parts])


def _grouped_row_to_hugging_face(cut: Cut, shards: list[torch.Tensor]) -> list[torch.Tensor]:
    each = [
        shard.reshape(cut.experts, -1, cut.architecture.hidden).transpose(1, 2) for shard in shards
    ]
    return [_cat(1)(cut, [x[e] for x in each])[0] for e in range(cut.experts)]


def _rows(shards: list[torch.Tensor]) -> torch.Tensor:
    """Shards one below the other: a view if they lie so in memory already."""
    first = shards[0]
    ends = [shard.storage_offset() + shard.numel() for shard in shards]
    adjacent = all(
        shard.is_contiguous()
        and shard.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and shard.storage_offset() == end
        for shard, end in zip(shards[1:], ends, strict=False)
    )
    if not adjacent:
        return torch.cat(shards)
    return first.as_strided(
        (sum(shard.shape[0] for shard in shards), *first.shape[1:]), first.stride()
    )


def _cat(dim: int) -> Callable[[Cut, list[torch.Tensor]], list[torch.Tensor]]:
    return lambda cut, shards: [shards[0] if len(shards) == 1 else torch.cat(shards, dim=dim)]


Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def _place_rows(cut: Cut, shard: torch.Tensor, rank: int, out: list[torch.Tensor]) -> Pairs:
    # without the padding of a vocabulary
    mine = out[0][rank * len(shard) : (rank + 1) * len(shard)]
    return [(shard[: len(mine)], mine)]


def _place_columns(cut: Cut, shard: torch.Tensor, rank: int, out: list[torch.Tensor]) -> Pairs:
    return [(shard, _slice(out[0], 1, rank, cut.ranks))]


def _place_gate_up(cut: Cut, shard: torch.Tensor, rank: int, out: list[torch.Tensor]) -> Pairs:
    return [
        (half, _slice(whole, 0, rank, cut.ranks))
        for half, whole in zip(shard.chunk(2), out, strict=True)
    ]


def _place_qkv(cut: Cut, shard: torch.Tensor, rank: int, out: list[torch.Tensor]) -> Pairs:
    groups = cut.architecture.kv_heads
    grouped = [whole.view(groups, -1, *whole.shape[1:]) for whole in out]
    mine = shard.reshape(groups // cut.ranks, -1, *shard.shape[1:]).split(
        [whole.shape[1] for whole in grouped], dim=1
    )
    return [
        (part, _slice(whole, 0, rank, cut.ranks)) for part, whole in zip(mine, grouped, strict=True)
    ]


TO_MEGATRON: dict[Split, Callable[[Cut, list[torch.Tensor], int], torch.Tensor]] = {
    "whole": lambda cut, parts, rank: parts[0],
    "column": lambda cut, parts, rank: _slice(parts[0], 0, rank, cut.ranks),
    "row": lambda cut, parts, rank: _slice(parts[0], 1, rank, cut.ranks),
    "vocab": _vocab_to_megatron,
    "qkv": _qkv_to_megatron,
    "gate_up": _gate_up_to_megatron,
    "grouped_gate_up": _grouped_gate_up_to_megatron,
    "grouped_row": _grouped_row_to_megatron,
}

TO_HUGGING_FACE: dict[Split, Callable[[Cut, list[torch.Tensor]], list[torch.Tensor]]] = {
    "whole": lambda cut, shards: [shards[0]],
    "column": lambda cut, shards: [_rows(shards)],
    "row": _cat(1),
    "vocab": lambda cut, shards: [_rows(shards)[: cut.architecture.vocab]],
    "qkv": _qkv_to_hugging_face,
    "gate_up": _gate_up_to_hugging_face,
    "grouped_gate_up": _grouped_gate_up_to_hugging_face,
    "grouped_row": _grouped_row_to_hugging_face,
}

# The parts of one rank's shard, each beside its place in whole Hugging Face tensors.
PLACES: dict[Split, Callable[[Cut, torch.Tensor, int, list[torch.Tensor]], Pairs]] = {
    "whole": _place_rows,
    "column": _place_rows,
    "vocab": _place_rows,
    "row": _place_columns,
    "qkv": _place_qkv,
    "gate_up": _place_gate_up,
}
