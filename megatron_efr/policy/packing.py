"""Dealing of sequences to updates, replicas and packed micro-batches; and the packs themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from megatron_efr.algorithms.objective import Aggregate
from megatron_efr.config import ParallelConfig
from megatron_efr.samples import COLUMNS, NOT_DRAWN, Array, PackedBatch, Sample, SequenceSize
from megatron_efr.types import ByIndex, Credit, Credited, FloatArray, Response, UserError
from megatron_efr.weights.architecture import Architecture

MicroBatches = list[list[int]]  # indices of sequences, micro-batch by micro-batch

_PIECES = 4  # in which a replica's work is dealt at least


class SharedPrompt(NamedTuple):
    """A prompt as the dealing knows it: `SequenceSize.prompt_id`, and its tokens."""

    prompt_id: int
    tokens: int


class UpdateShares(NamedTuple):
    """An optimizer update before its tokens are there: each replica's micro-batches, each
    sequence's `row_weights`.
    """

    shares: list[MicroBatches]
    weights: dict[int, float]

    def own(self, replica: int) -> list[int]:
        """The sequences that a replica trains on."""
        return [i for batch in self.shares[replica] for i in batch]


def samples(groups: Sequence[Credited]) -> list[Sample]:
    """The responses of credited groups as samples to train on, each with the answers of its
    branches behind it.
    """
    made = []
    for credited in groups:
        group, credit = credited.group, credited.credit
        prompt = np.array(group.prompt.tokens, np.int32)
        for i, response in enumerate(group.responses):
            advantage = (
                credit.advantage[i]
                if credit.per_token is None
                else credit.advantage[i] + credit.per_token[i]
            )
            columns = _columns(response, advantage, _weight(credit, i, len(response.tokens)))
            tokens = np.concatenate([prompt, np.array(response.tokens, np.int32)])
            made.append(Sample(tokens, len(prompt), columns, response.routed_experts))
            if credit.branches is not None and len(credit.branches[i]):
                made += _branch_samples(made[-1], response, credit.branches[i], credit.beginnings)
    return made


def _branch_samples(
    of: Sample, response: Response, advantages: FloatArray, beginnings: bool
) -> list[Sample]:
    """The answers of a response's branches, each behind prompt and beginning, of which `of` is the
    response's sample.

    With `beginnings` a beginning is trained on with the answer's advantage, but for what a script
    forced in it.
    """
    made = []
    for (at, answer), advantage in zip(response.answers, advantages, strict=True):
        start = of.prompt_length + at
        own = Sample(np.array(answer.tokens, np.int32), 0, _columns(answer, advantage))
        prompt = start
        columns = own.columns
        if beginnings:
            begun = {name: values[:at] for name, values in _columns(response, advantage).items()}
            prompt = of.prompt_length
            columns = _joined_columns([Sample(of.tokens[prompt:start], 0, begun), own])
        tokens = np.concatenate([of.tokens[:start], own.tokens])
        made.append(Sample(tokens, prompt, columns, answer.routed_experts))
    return made


def _weight(credit: Credit, i: int, count: int) -> Array | None:
    """The weights [count] in the loss that a credit gives response i; None: 1 each."""
    if credit.masked is not None and credit.masked[i]:
        return np.zeros(count)
    return None if credit.weight is None else credit.weight[i]


def _columns(
    response: Response, advantage: float | FloatArray, weight: Array | None = None
) -> dict[str, Array]:
    """The columns of a response, which stand if it says something of them; one advantage, or one
    for each token.

    Tokens that a script forced weigh nothing, and no weights drew what it wrote.
    """
    count = len(response.tokens)
    written = [part for part in response.parts if part.ending in ("forced", "chosen")]
    made: dict[str, Array] = {
        "engine_logprob": response.logprobs,
        "advantage": np.full(count, advantage, np.float64),
    }
    if weight is not None:
        made["weight"] = weight
    if any(part.forced for part in written):
        made["weight"] = made.get("weight", np.ones(count)) * response.trained
    if response.versions:
        made["version"] = np.full(count, NOT_DRAWN)
        for span in response.versions:
            made["version"][span.start : span.end] = span.version
        for part in written:
            made["version"][part.start : part.end] = NOT_DRAWN
    return {name: np.asarray(values, COLUMNS[name].dtype) for name, values in made.items()}


def split_into_updates(sequences: int, updates: int, seed: Sequence[int]) -> list[list[int]]:
    """Deal `sequences` indices into `updates` parts, equal or differing by one, at random from
    `seed`.

    Drawn before anything is split over ranks, so which sequences form an update is the same in
    every layout.
    """
    order = np.random.default_rng(seed).permutation(sequences)
    return [part.tolist() for part in np.array_split(order, updates)]


def sequence_flops(architecture: Architecture) -> Callable[[int], float]:
    """FLOPs of a sequence's forward pass as a function of its tokens: every matrix for each,
    attention for each pair.

    Two per multiply-add. Causal attention multiplies queries with keys and weights with values,
    over half the square.
    """
    a = architecture
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    mlp = 3 * a.hidden * (a.experts.ffn * a.experts.per_token if a.experts else a.ffn)
    per_token = 2.0 * (a.layers * (a.hidden * (2 * q + 2 * kv) + mlp) + a.hidden * a.vocab)
    per_pair = 2.0 * a.layers * q
    return lambda tokens: per_token * tokens + per_pair * tokens**2


def multiples(parallel: ParallelConfig) -> tuple[int, int]:
    """(tokens that a sequence's padded length divides by, tokens that a whole pack's does).

    A sequence divides into 2 chunks for each context rank; a context rank's slice divides over the
    ranks of sequence parallelism.
    """
    sequence = 2 * parallel.context if parallel.context > 1 else 1
    slices = parallel.tensor if parallel.sequence else 1
    return sequence, math.lcm(sequence, parallel.context * slices)


class _Piece(NamedTuple):
    """Sequences that stay together, the tokens of the budget that they take, and their work."""

    indices: list[int]
    tokens: float
    work: float


def balance(
    lengths: Mapping[int, int],
    replicas: int,
    budget: int,
    multiple: int = 1,
    cost: Callable[[int], float] = float,
    prompts: Mapping[int, SharedPrompt] | None = None,
    repeated: float = 1.0,
) -> list[MicroBatches]:
    """Micro-batches of one update for every replica: similar work, equally many, at most `budget`
    tokens each.

    `lengths` are the tokens of each of the update's sequences, by index; `cost` is a sequence's
    work, from its tokens. Costliest first to the replica with the least work so far, and within a
    replica to the micro-batch with the least. Their number is a multiple of `multiple`: the
    interleaved pipeline schedule takes groups of as many as there are stages. A sequence longer
    than the budget gets a micro-batch of its own; with few sequences some are empty.

    With `prompts`, where `pack` is to lay those once that several sequences share, such sequences
    are kept together as far as that leaves replicas balanced and micro-batches few. Their prompt's
    work counts once, and for every other sequence of them its tokens take `repeated` of the budget
    each.
    """

    def piece(indices: list[int]) -> _Piece:
        tokens = float(sum(lengths[i] for i in indices))
        work = sum(cost(lengths[i]) for i in indices)
        if prompts is not None and (others := len(indices) - 1):
            prompt = prompts[indices[0]].tokens
            tokens -= others * prompt * (1 - repeated)
            work -= others * cost(prompt)
        return _Piece(indices, tokens, work)

    # costliest first, each to the replica that has least to do
    together = [[i] for i in lengths] if prompts is None else _of_one_prompt(lengths, prompts)
    most = sum(map(cost, lengths.values())) / (replicas * _PIECES)
    pieces = [part for each in together for part in _parts(piece, each, budget, most)]
    shares: list[list[_Piece]] = [[] for _ in range(replicas)]
    loads = [0.0] * replicas
    for each in sorted(pieces, key=lambda each: (-each.work, each.indices)):
        replica = loads.index(min(loads))
        shares[replica].append(each)
        loads[replica] += each.work
    # the fewest micro-batches that fit the budget, as many on every replica
    count = round_up(max(_fewest(share, budget) for share in shares), multiple)
    while True:
        spread = [_spread(share, count, budget, piece) for share in shares]
        found = [batches for batches in spread if batches is not None]
        if len(found) == replicas:
            return found
        count += multiple


def _of_one_prompt(
    lengths: Mapping[int, int], prompts: Mapping[int, SharedPrompt]
) -> list[list[int]]:
    """The sequences of each prompt, longest first."""
    found: dict[SharedPrompt, list[int]] = {}
    for i in sorted(lengths, key=lambda i: (-lengths[i], i)):
        found.setdefault(prompts[i], []).append(i)
    return list(found.values())


def _parts(
    piece: Callable[[list[int]], _Piece], indices: list[int], budget: int, most: float
) -> list[_Piece]:
    """Sequences of one prompt in as few alike parts as fit into a micro-batch each, with at most
    the work `most`.
    """
    whole = piece(indices)
    count = min(len(indices), math.ceil(max(whole.tokens / budget, whole.work / most)))
    return [whole] if count == 1 else [piece(indices[part::count]) for part in range(count)]


def _fewest(share: Sequence[_Piece], budget: int) -> int:
    """A number of micro-batches below which these pieces cannot do: at least 1, and near what they
    need.

    At most k sequences longer than 1 / (k + 1) of the budget fit into one. Without that, trying
    numbers one by one from what the tokens need takes minutes if a thousand sequences are all a
    little over half of the budget.
    """
    alone = [each.tokens for each in share if len(each.indices) == 1]
    over = (-(-sum(tokens * (k + 1) > budget for tokens in alone) // k) for k in range(1, 9))
    return max(1, math.ceil(sum(each.tokens for each in share) / budget), *over)


def _spread(
    share: Sequence[_Piece], count: int, budget: int, piece: Callable[[list[int]], _Piece]
) -> MicroBatches | None:
    """A replica's pieces, costliest first, over `count` similar micro-batches; one that does not
    fit is halved. None if a sequence does not fit.
    """
    batches: MicroBatches = [[] for _ in range(count)]
    tokens, work = np.zeros(count), np.zeros(count)
    waiting = list(reversed(share))
    while waiting:
        each = waiting.pop()
        alone = len(each.indices) == 1
        # the idlest that it fits into: mostly the first looked at
        b = int(work.argmin())
        if tokens[b] + each.tokens > budget:
            fitting = tokens + each.tokens <= budget
            if alone:  # it may be longer than the budget
                fitting |= tokens == 0
            if not fitting.any():
                if alone:
                    return None
                waiting += [piece(each.indices[half::2]) for half in (1, 0)]
                continue
            b = int(np.where(fitting, work, np.inf).argmin())
        batches[b] += each.indices
        tokens[b] += each.tokens
        work[b] += each.work
    return batches


def costs(batch: PackedBatch, cost: Callable[[int], float]) -> list[float]:
    """The work of each of a micro-batch's sequences, by `cost` of its tokens; that of a shared
    prompt is the first one's.
    """
    found, seen = [], set()
    starts = np.cumsum([0, *batch.lengths])
    for start, length, response in zip(starts, batch.lengths, batch.row_lengths, strict=False):
        at = start if batch.layout is None else int(batch.layout[start])
        found.append(cost(length) - (cost(length - response) if at in seen else 0.0))
        seen.add(at)
    return found


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `number`."""
    return -(-number // multiple) * multiple


def row_weights(
    sizes: ByIndex[SequenceSize],
    update: list[int],
    aggregate: Aggregate,
    divisor: int | None = None,
) -> dict[int, float]:
    """Factors by which the loss of one update multiplies each sample's column `weight` (indices
    over all replicas).

    `sequence`: the mean over a sample's trained tokens, then over samples. `token`: the mean over
    all trained tokens. `constant`: a sample's sum over `divisor` (None: the update's longest
    response), then the mean over samples. Samples without a trained token weigh nothing, and are
    not counted.
    """
    trained = [i for i in update if sizes[i].trained]
    weights = dict.fromkeys(update, 0.0)
    if aggregate == "token":
        total = sum(sizes[i].trained for i in trained)
        return weights | dict.fromkeys(trained, 1.0 / max(total, 1))
    if aggregate == "constant":
        over = divisor or max((sizes[i].response for i in update), default=1)
        return weights | dict.fromkeys(trained, 1.0 / (over * max(len(trained), 1)))
    return weights | {i: 1.0 / (sizes[i].trained * len(trained)) for i in trained}


def check_tokens(samples: ByIndex[Sample], indices: list[int], vocab: int) -> None:
    """UserError for a token id that the model does not know: on a card nobody would look."""
    for i in indices:
        low, high = int(samples[i].tokens.min()), int(samples[i].tokens.max())
        if low < 0 or high >= vocab:
            raise UserError(
                f"sequence {i} holds token id {low if low < 0 else high}, and the model's "
                f"vocabulary is {vocab} (config.json's vocab_size): were prompts or responses "
                "made with another tokenizer?"
            )


def pack(
    samples: ByIndex[Sample],
    indices: list[int],
    weights: Mapping[int, float],
    device: torch.device,
    multiple: int = 1,
    each: int = 1,
    share_prompts: bool = False,
) -> PackedBatch:
    """Lay `samples[i] for i in indices` end to end, each padded at its end to a multiple of `each`.

    Those of advantage 0 come last, so that the head can leave them out of its gradients at no cost.
    With `share_prompts`, for `multiple` and `each` of 1, a prompt that several of them have is laid
    once. Column `weight` is each token's times its sample's of `weights`.

    A padding sequence fills the pack up to a multiple of `multiple`, itself one of `each`. Without
    indices the pack is padding alone: a replica with less work than the others still takes part.
    """
    # samples without an advantage last: their rows need no gradient
    known = all("advantage" in samples[i].columns for i in indices)
    idle = {i: known and not samples[i].columns["advantage"].any() for i in indices}
    indices = sorted(indices, key=idle.__getitem__)
    # lay them end to end, each padded, and the whole padded by one more
    chosen = [samples[i] for i in indices]
    lengths = [round_up(sample.length, each) for sample in chosen]
    padding = -sum(lengths) % multiple if chosen else multiple
    if padding:
        lengths = [*lengths, padding]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    # tokens at their places
    tokens = np.zeros(starts[-1], np.int64)
    for sample, start in zip(chosen, starts, strict=False):
        tokens[start : start + sample.length] = sample.tokens
    # the row before each response token predicts it
    rows = np.concatenate(
        [np.zeros(0, np.int64)]
        + [
            np.arange(start + s.prompt_length - 1, start + s.length - 1)
            for s, start in zip(chosen, starts, strict=False)
        ]
    )
    row_lengths = [s.response_length for s in chosen]
    targets = tokens[rows + 1]
    # each sequence counts positions from 0; the loss's weight goes into a column
    positions = np.arange(len(tokens)) - np.repeat(starts[:-1], lengths)
    columns = _joined_columns(chosen)
    columns["weight"] *= np.repeat(
        np.array([weights[i] for i in indices], dtype=np.float32), row_lengths
    )
    # a prompt that was laid before is left out, and its places are those of the first
    layout, kept = _shared(chosen, starts) if share_prompts else (None, None)
    if layout is not None:
        tokens, positions, rows = tokens[kept], positions[kept], layout[rows]
    return PackedBatch(
        tokens=torch.from_numpy(tokens).to(device),
        positions=torch.from_numpy(positions).to(device),
        lengths=lengths,
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)).to(device),
        rows=torch.from_numpy(rows).to(device),
        targets=torch.from_numpy(targets).to(device),
        row_lengths=row_lengths,
        indices=indices,
        columns={name: torch.from_numpy(values).to(device) for name, values in columns.items()},
        live=len(indices) - sum(idle.values()) if known else None,
        chosen="version" in columns
        and bool(np.any((columns["version"] == NOT_DRAWN) & (columns["weight"] > 0))),
        layout=None if layout is None else torch.from_numpy(layout),
    )


def _shared(chosen: Sequence[Sample], starts: Array) -> tuple[Array | None, Array]:
    """The `layout` of samples that begin at `starts`, each distinct prompt laid once (None if all
    are distinct), and which tokens are kept.
    """
    kept = np.ones(starts[-1], bool)
    layout = np.arange(starts[-1])
    first: dict[tuple[int, ...], int] = {}
    for sample, start in zip(chosen, starts, strict=False):
        prompt = sample.prompt_length
        earlier = first.setdefault(tuple(sample.tokens[:prompt].tolist()), start)
        if earlier != start:
            kept[start : start + prompt] = False
            layout[start : start + prompt] = np.arange(earlier, earlier + prompt)
    return None if kept.all() else (np.cumsum(kept) - 1)[layout], kept


def _joined_columns(samples: Sequence[Sample]) -> dict[str, Array]:
    """The columns [R] of samples end to end: those that all have, and those with a default."""
    return {
        name: np.concatenate(
            [np.zeros(0, column.dtype), *(sample.column(name) for sample in samples)]
        )
        for name, column in COLUMNS.items()
        if column.default is not None or all(name in sample.columns for sample in samples)
    }
