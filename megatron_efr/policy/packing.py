"""Which sequences go where: updates, data-parallel replicas, packed micro-batches; and the packs themselves."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Literal

import numpy as np
import torch

from megatron_efr.types import Group, PackedBatch, Sequence

MicroBatches = list[list[int]]  # indices of sequences, micro-batch by micro-batch


def trainable(group: Group) -> list[Sequence]:
    """A scored group's responses as sequences to train on."""
    assert group.advantages is not None
    prompt = group.prompt.tokens
    return [
        Sequence([*prompt, *response.tokens], len(prompt), float(advantage), response.logprobs)
        for response, advantage in zip(group.responses, group.advantages, strict=True)
    ]


def split_into_updates(sequences: int, updates: int, seed: SequenceOf[int]) -> list[list[int]]:
    """Deal `sequences` indices into `updates` equal parts, at random from `seed`.

    Drawn before anything is split over ranks, so which sequences form an update is the same in every layout.
    """
    order = np.random.default_rng(seed).permutation(sequences)
    return [part.tolist() for part in np.split(order, updates)]


def balance(lengths: Mapping[int, int], replicas: int, budget: int, multiple: int = 1) -> list[MicroBatches]:
    """Micro-batches of one update for every replica: similar work, equally many, at most `budget` tokens each.

    `lengths` are the tokens of each of the update's sequences, by index. The number of micro-batches is a multiple of
    `multiple`: the interleaved pipeline schedule takes groups of as many as there are stages.
    Longest first to the replica with the least tokens so far; within a replica first-fit into micro-batches. A sequence
    longer than the budget gets a micro-batch of its own.
    """
    shares: list[list[int]] = [[] for _ in range(replicas)]
    loads = [0] * replicas
    for i in sorted(lengths, key=lambda i: (-lengths[i], i)):
        replica = loads.index(min(loads))
        shares[replica].append(i)
        loads[replica] += lengths[i]
    packed = [_first_fit(share, lengths, budget) for share in shares]
    count = round_up(max(len(batches) for batches in packed), multiple)
    return [_pad_to(batches, count) for batches in packed]


def _first_fit(share: list[int], lengths: Mapping[int, int], budget: int) -> MicroBatches:
    batches: MicroBatches = []
    room: list[int] = []
    for i in share:
        for b, left in enumerate(room):
            if lengths[i] <= left:
                batches[b].append(i)
                room[b] -= lengths[i]
                break
        else:
            batches.append([i])
            room.append(budget - lengths[i])
    return batches


def _pad_to(batches: MicroBatches, count: int) -> MicroBatches:
    """Split the fullest micro-batches until there are `count`, then add empty ones: every replica runs as many."""
    batches = [list(batch) for batch in batches]
    while len(batches) < count:
        fullest = max(range(len(batches)), key=lambda b: len(batches[b]))
        whole = batches[fullest]
        batches[fullest] = whole[0::2]
        batches.append(whole[1::2])
    return batches


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `number`."""
    return -(-number // multiple) * multiple


def row_weights(
    sequences: SequenceOf[Sequence], update: list[int], aggregate: Literal["sequence", "token"]
) -> dict[int, float]:
    """The weight of each sequence's tokens in the loss of one update (indices over all replicas).

    `sequence`: the mean over a sequence's tokens, then over sequences. `token`: the mean over all tokens.
    """
    if aggregate == "token":
        total = sum(sequences[i].response_length for i in update)
        return dict.fromkeys(update, 1.0 / total)
    return {i: 1.0 / (sequences[i].response_length * len(update)) for i in update}


def pack(
    sequences: SequenceOf[Sequence],
    indices: list[int],
    weights: Mapping[int, float],
    device: torch.device,
    multiple: int = 1,
    each: int = 1,
) -> PackedBatch:
    """Lay `sequences[i] for i in indices` end to end, each padded at its end to a multiple of `each`.

    A padding sequence fills the pack up to a multiple of `multiple`, itself one of `each`. Without indices the pack is
    padding alone: a replica with less work than the others still takes part.
    """
    chosen = [sequences[i] for i in indices]
    lengths = [round_up(sequence.length, each) for sequence in chosen]
    padding = -sum(lengths) % multiple if chosen else multiple
    if padding:
        lengths = [*lengths, padding]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.zeros(starts[-1], np.int64)
    for sequence, start in zip(chosen, starts, strict=False):
        tokens[start : start + sequence.length] = sequence.tokens
    # the row before each response token predicts it
    rows = np.concatenate(
        [np.zeros(0, np.int64)]
        + [
            np.arange(start + s.prompt_length - 1, start + s.length - 1)
            for s, start in zip(chosen, starts, strict=False)
        ]
    )
    row_lengths = [s.response_length for s in chosen]
    positions = np.arange(len(tokens)) - np.repeat(starts[:-1], lengths)
    weight = np.repeat(np.array([weights[i] for i in indices], dtype=np.float32), row_lengths)
    return PackedBatch(
        tokens=torch.from_numpy(tokens).to(device),
        positions=torch.from_numpy(positions).to(device),
        lengths=lengths,
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)).to(device),
        rows=torch.from_numpy(rows).to(device),
        targets=torch.from_numpy(tokens[rows + 1]).to(device),
        row_lengths=row_lengths,
        indices=list(indices),
        weights=torch.from_numpy(weight).to(device),
    )
