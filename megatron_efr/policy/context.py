"""Context parallelism: each sequence's tokens in zigzag over the ranks, heads exchanged for tokens
in attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import all_to_all

from megatron_efr.samples import PackedBatch


def zigzag(lengths: Sequence[int], rank: int, ranks: int) -> torch.Tensor:
    """Places in the pack of the tokens that context rank `rank` holds, in its own order: int64
    [tokens / ranks].

    Every sequence is cut into 2 * ranks chunks, and rank r holds chunks r and 2 * ranks - 1 - r:
    all ranks have the same causal work. Megatron's packed rotary embedding and Transformer Engine's
    attention assume this layout; a contiguous cut would be mis-rotated without a word. ValueError
    if a length is no multiple of 2 * ranks.
    """
    if any(length % (2 * ranks) for length in lengths):
        raise ValueError(
            f"sequences of {list(lengths)} tokens do not divide into {2 * ranks} chunks; pack "
            "pads them"
        )
    starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    pieces = []
    for start, length in zip(starts, lengths, strict=False):
        chunk = length // (2 * ranks)
        for c in (rank, 2 * ranks - 1 - rank):
            pieces.append(np.arange(start + c * chunk, start + (c + 1) * chunk))
    return torch.from_numpy(np.concatenate(pieces))


def rank_order(lengths: Sequence[int], ranks: int) -> torch.Tensor:
    """The place of every token of the pack once all ranks' slices are laid one after the other:
    int64 [tokens].
    """
    order = torch.cat([zigzag(lengths, rank, ranks) for rank in range(ranks)])
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))


def own_rows(batch: PackedBatch, rank: int, ranks: int) -> torch.Tensor:
    """Rows of the micro-batch on tokens of context rank `rank`: int64, indices into [R]."""
    place = rank_order(batch.lengths, ranks).to(batch.rows.device)[batch.rows]
    return (place // (batch.tokens.numel() // ranks) == rank).nonzero()[:, 0]


def part(batch: PackedBatch, rank: int, ranks: int) -> PackedBatch:
    """The share of context rank `rank`: its tokens, and the rows among them with their targets and
    columns.

    `lengths` and `cu_seqlens` stay those of whole sequences, as Megatron wants them. Targets were
    shifted in the whole sequence, so a row at the end of a chunk still predicts its successor.
    """
    if ranks == 1:
        return batch
    device = batch.tokens.device
    held = zigzag(batch.lengths, rank, ranks).to(device)
    rows = own_rows(batch, rank, ranks)
    place = rank_order(batch.lengths, ranks).to(device)
    row_lengths = torch.tensor(batch.row_lengths, dtype=torch.int64)
    sequence = torch.arange(len(row_lengths)).repeat_interleave(row_lengths)
    return replace(
        batch,
        tokens=batch.tokens[held],
        positions=batch.positions[held],
        rows=place[batch.rows[rows]] - rank * len(held),
        targets=batch.targets[rows],
        row_lengths=sequence[rows.cpu()].bincount(minlength=len(row_lengths)).tolist(),
        columns={name: values[rows] for name, values in batch.columns.items()},
        routed_experts=None if batch.routed_experts is None else batch.routed_experts[held.cpu()],
    )


def tokens_for_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[tokens / ranks, heads, dim] of all heads to [tokens, heads / ranks, dim] of some, the ranks'
    slices in order.

    One all-to-all for query, key and value. KV groups that the ranks do not divide are repeated
    until they do: consecutive query heads go to a rank together, so it receives exactly the groups
    they read.
    """
    ranks = group.size()
    repeat = math.lcm(key.shape[1], ranks) // key.shape[1]
    if repeat > 1:
        key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    tokens, dim = query.shape[0], query.shape[2]
    by_rank = [x.reshape(tokens, ranks, -1, dim) for x in (query, key, value)]
    sizes = [x.shape[2] for x in by_rank]
    # [ranks, tokens / ranks, heads / ranks, dim]
    sent = torch.cat(by_rank, dim=2).transpose(0, 1).contiguous()
    received = all_to_all(group, sent).flatten(0, 1)
    q, k, v = received.split(sizes, dim=1)
    return q, k, v


def heads_for_tokens(attended: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The way back: [tokens, heads / ranks, dim], rank after rank, to this rank's [tokens / ranks,
    heads, dim].
    """
    ranks = group.size()
    sent = attended.reshape(ranks, -1, *attended.shape[1:]).contiguous()
    return all_to_all(group, sent).transpose(0, 1).flatten(1, 2)
