"""Splitting work: every sequence once, the same updates in every layout, packs that say where
everything is.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2ForCausalLM

from megatron_efr.policy import context, packing
from megatron_efr.policy.layers import PackedAttention, packed_sequences
from megatron_efr.policy.packing import (
    SharedPrompt,
    balance,
    costs,
    pack,
    row_weights,
    samples,
    sequence_flops,
    split_into_updates,
)
from megatron_efr.samples import NOT_DRAWN, Sample
from megatron_efr.steps import Part
from megatron_efr.types import Credit, Credited, Group, Prompt, Response, VersionSpan
from megatron_efr.weights.architecture import Architecture
from tests.conftest import ragged_sequences
from tests.groups import credited, with_columns

QWEN_1_5B = Architecture.from_config({
    "model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151936,
    "max_position_embeddings": 131072,
})  # fmt: skip


def test_updates_are_a_partition_drawn_from_the_seed() -> None:
    parts = split_into_updates(256, 4, (42, 7))
    assert [len(part) for part in parts] == [64] * 4
    assert sorted(i for part in parts for i in part) == list(range(256))
    assert parts == split_into_updates(256, 4, (42, 7)) != split_into_updates(256, 4, (42, 8))


@given(
    lengths=st.lists(st.integers(1, 500), min_size=8, max_size=80),
    replicas=st.integers(1, 8),
    budget=st.integers(100, 1000),
)
@settings(max_examples=150, deadline=None)
def test_balance_loses_nothing_and_keeps_its_budget(
    lengths: list[int], replicas: int, budget: int
) -> None:
    table = dict(enumerate(lengths, start=10))
    shares = balance(table, replicas, budget)
    assert sorted(i for share in shares for batch in share for i in batch) == sorted(table)
    assert len({len(share) for share in shares}) == 1, "every replica runs as many micro-batches"
    for share in shares:
        for batch in share:
            assert batch or all(len(other) <= 1 for other in share), (
                "split what can be split before adding empty ones"
            )
            assert sum(table[i] for i in batch) <= budget or len(batch) == 1
    loads = [sum(table[i] for batch in share for i in batch) for share in shares]
    # longest-first greedy: no replica exceeds the mean by more than one sequence
    assert max(loads) <= np.mean(loads) + max(lengths)


@given(
    drawn=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 60)), min_size=8, max_size=80),
    prompts=st.lists(st.integers(1, 90), min_size=6, max_size=6),
    replicas=st.integers(1, 4),
    budget=st.integers(100, 1000),
    repeated=st.sampled_from([0.25, 1.0]),
)
@settings(max_examples=150, deadline=None)
def test_sequences_of_one_prompt_stay_together_within_the_budget(
    drawn: list[tuple[int, int]],
    prompts: list[int],
    replicas: int,
    budget: int,
    repeated: float,
) -> None:
    known = {i: SharedPrompt(which, prompts[which]) for i, (which, _) in enumerate(drawn, start=10)}
    lengths = {i: prompts[which] + n for i, (which, n) in enumerate(drawn, start=10)}
    shares = balance(lengths, replicas, budget, prompts=known, repeated=repeated)
    assert sorted(i for share in shares for batch in share for i in batch) == sorted(lengths)
    assert len({len(share) for share in shares}) == 1

    def size(batch: list[int], again: float) -> float:
        """Tokens, of a prompt that was there before so many."""
        distinct = {known[i] for i in batch}
        repeats = sum(known[i].tokens for i in batch) - sum(each.tokens for each in distinct)
        return sum(lengths[i] for i in batch) - repeats * (1 - again)

    for share in shares:
        for batch in share:
            assert size(batch, repeated) <= budget + 1e-9 or len(batch) == 1
    loads = [sum(size(batch, 0.0) for batch in share) for share in shares]
    # a piece is at most a quarter of a replica's work, or a sequence
    total = sum(lengths.values())
    assert max(loads) <= total / replicas + max(total / replicas / 4, *lengths.values())


def test_what_shares_a_prompt_is_placed_together() -> None:
    """Of 16 prompts with 4 responses each, dealt to two updates at random and two micro-batches of
    each: nearly every prompt is laid once an update.
    """
    rng = np.random.default_rng(0)
    lengths = {i: 50 + int(n) for i, n in enumerate(rng.integers(20, 70, 64))}
    prompts = {i: SharedPrompt(i // 4, 50) for i in lengths}
    laid = {"together": 0, "apart": 0}
    least = 0
    for update in split_into_updates(64, 2, (1, 2)):
        own = {i: lengths[i] for i in update}
        least += len({prompts[i] for i in update})
        for name, known in (("together", prompts), ("apart", None)):
            (batches,) = balance(own, 1, 1600, prompts=known, repeated=0.3)
            assert len(batches) == 2
            laid[name] += sum(len({prompts[i] for i in batch}) for batch in batches)
    assert (least, laid) == (31, {"together": 31, "apart": 44})


def test_a_piece_that_fits_nowhere_is_halved() -> None:
    """Three responses of 30 tokens and their prompt of 40 are 130. Three such pieces fit into two
    micro-batches of 235 tokens if one of them is parted: 200 and 230; of 200 each they need three.
    """
    lengths, prompts = dict.fromkeys(range(9), 70), {i: SharedPrompt(i // 3, 40) for i in range(9)}
    for budget, sizes in ((235, [4, 5]), (200, [3, 3, 3])):
        (batches,) = balance(lengths, 1, budget, prompts=prompts, repeated=0.0)
        assert sorted(len(batch) for batch in batches) == sizes


def test_work_counts_a_shared_prompt_once() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 61, 7), rng.integers(0, 61, 5)
    drawn = [Sample(np.concatenate([p, rng.integers(0, 61, n)]), len(p))
             for p, n in ((one, 3), (other, 4), (one, 6))]  # fmt: skip
    for share, work in ((True, [100.0, 81.0, 169.0 - 49.0]), (False, [100.0, 81.0, 169.0])):
        batch = pack(
            drawn, [0, 1, 2], dict.fromkeys(range(3), 1.0), torch.device("cpu"), share_prompts=share
        )
        assert costs(batch, lambda tokens: float(tokens**2)) == work


def test_weights_are_the_two_means() -> None:
    sizes = [sequence.size for sequence in ragged_sequences(10)]
    update = [1, 4, 7]
    n = {i: sizes[i].response for i in update}
    assert row_weights(sizes, update, "sequence") == {
        i: pytest.approx(1 / (3 * n[i])) for i in update
    }
    assert row_weights(sizes, update, "token") == {
        i: pytest.approx(1 / sum(n.values())) for i in update
    }


def test_pack_says_where_everything_is() -> None:
    sequences = ragged_sequences(5)
    batch = pack(sequences, [3, 0], {3: 0.5, 0: 0.25}, torch.device("cpu"), multiple=64)
    total = sequences[3].length + sequences[0].length
    assert batch.tokens.numel() % 64 == 0
    assert sum(batch.lengths) == batch.tokens.numel()
    assert batch.cu_seqlens.tolist()[:3] == [0, sequences[3].length, total]
    for place, i in enumerate(batch.indices):
        s, start = sequences[i], int(batch.cu_seqlens[place])
        assert batch.tokens[start : start + s.length].tolist() == s.tokens.tolist()
        assert batch.positions[start : start + s.length].tolist() == list(range(s.length))
    responses = [t for i in (3, 0) for t in sequences[i].tokens[sequences[i].prompt_length :]]
    assert batch.targets.tolist() == responses
    assert (batch.tokens[batch.rows + 1]).tolist() == responses
    assert (
        batch.columns["weight"].tolist()
        == [0.5] * batch.row_lengths[0] + [0.25] * batch.row_lengths[1]
    )


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), groups=st.sampled_from([1, 2, 4])
)
@settings(max_examples=40, deadline=None)
def test_packed_attention_is_attention_within_each_sequence(
    lengths: list[int], groups: int
) -> None:
    torch.manual_seed(sum(lengths))
    heads, dim, tokens = 4, 8, sum(lengths)
    q = torch.randn(tokens, heads, dim, dtype=torch.float64, requires_grad=True)
    k = torch.randn(tokens, groups, dim, dtype=torch.float64, requires_grad=True)
    v = torch.randn(tokens, groups, dim, dtype=torch.float64, requires_grad=True)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    attention = PackedAttention.__new__(PackedAttention)
    torch.nn.Module.__init__(attention)
    attention.scale = None
    packed = packed_sequences(lengths, torch.from_numpy(starts))
    out = attention.forward(q, k, v, None, packed_seq_params=packed)
    parts = []
    for a, b in itertools.pairwise(starts):
        kk, vv = (x[a:b].repeat_interleave(heads // groups, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], kk) / dim**0.5
        scores = scores.masked_fill(torch.ones(b - a, b - a).triu(1).bool(), -torch.inf)
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), vv).flatten(1))
    exact = torch.cat(parts)
    assert (out - exact).abs().max() < 1e-12
    upstream = torch.randn_like(exact)
    got = torch.autograd.grad(out, [q, k, v], upstream)
    want = torch.autograd.grad(exact, [q, k, v], upstream)
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(got, want, strict=True))


@given(
    prompts=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    asked=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20)), min_size=1, max_size=8),
)
@settings(max_examples=40, deadline=None)
def test_a_shared_prompt_is_laid_once_and_attended_to_as_if_each_response_had_its_own(
    prompts: list[int], asked: list[tuple[int, int]]
) -> None:
    rng = np.random.default_rng(sum(prompts))
    known = [rng.integers(0, 61, length) for length in prompts]
    pairs = [(known[which % len(known)], rng.integers(0, 61, n)) for which, n in asked]
    drawn = [Sample(np.concatenate([p, r]), len(p)) for p, r in pairs]
    everyone, weights = list(range(len(drawn))), dict.fromkeys(range(len(drawn)), 1.0)
    plain = pack(drawn, everyone, weights, torch.device("cpu"))
    batch = pack(drawn, everyone, weights, torch.device("cpu"), share_prompts=True)
    # one of each prompt, and all that is said of tokens is what was said of them apart
    distinct = {tuple(p.tolist()) for p, _ in pairs}
    assert len(batch.tokens) == sum(map(len, distinct)) + sum(len(r) for _, r in pairs)
    layout = torch.arange(len(plain.tokens)) if batch.layout is None else batch.layout
    assert (batch.layout is None) == (len(distinct) == len(pairs))
    assert torch.equal(batch.tokens[layout], plain.tokens)
    assert torch.equal(batch.positions[layout], plain.positions)
    assert torch.equal(batch.rows, layout[plain.rows])
    assert torch.equal(batch.targets, plain.targets)
    assert (batch.lengths, batch.row_lengths) == (plain.lengths, plain.row_lengths)
    # attention, and its gradients, which add up over those that attend to a shared prompt
    x = torch.randn(3, len(batch.tokens), 2, 8, dtype=torch.float64, requires_grad=True)
    attention = PackedAttention.__new__(PackedAttention)
    torch.nn.Module.__init__(attention)
    attention.scale = None
    described = packed_sequences(batch.lengths, batch.cu_seqlens, layout=batch.layout)
    out = attention.forward(*x.unbind(), None, packed_seq_params=described)[batch.rows]
    exact = attention.forward(
        *x[:, layout].unbind(), None,
        packed_seq_params=packed_sequences(plain.lengths, plain.cu_seqlens),
    )[plain.rows]  # fmt: skip
    assert (out - exact).abs().max() < 1e-12
    upstream = torch.randn_like(exact)
    (got,) = torch.autograd.grad(out, x, upstream)
    (want,) = torch.autograd.grad(exact, x, upstream)
    assert (got - want).abs().max() < 1e-12


@pytest.mark.parametrize("replicas", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("spread", [0.5, 1.0, 1.5])
def test_replicas_have_similar_work(replicas: int, spread: float) -> None:
    """256 log-normal responses up to 32k tokens: at most 5% above max(mean, longest), attention
    counted.
    """
    flops = sequence_flops(QWEN_1_5B)
    for seed in range(5):
        drawn = np.random.default_rng(seed).lognormal(np.log(4000), spread, 256)
        lengths = dict(enumerate(np.clip(drawn, 100, 32768).astype(int).tolist()))
        shares = balance(lengths, replicas, 33_280, multiple=4, cost=flops)
        assert len({len(share) for share in shares}) == 1
        assert len(shares[0]) % 4 == 0
        loads = [sum(flops(lengths[i]) for batch in share for i in batch) for share in shares]
        bound = max(sum(loads) / replicas, max(flops(length) for length in lengths.values()))
        assert max(loads) <= 1.05 * bound


def test_flops_count_what_torch_multiplies(tied_model: Path) -> None:
    """Against the products that torch's own counter sees in transformers' model."""
    from torch.utils.flop_counter import FlopCounterMode

    model = Qwen2ForCausalLM.from_pretrained(tied_model, attn_implementation="eager")
    architecture = Architecture.from_folder(tied_model)
    flops = sequence_flops(architecture)
    for tokens in (16, 64):
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, tokens, dtype=torch.int64))
        pairs = 2.0 * architecture.layers * architecture.heads * architecture.head_dim * tokens**2
        assert counter.get_total_flops() == flops(tokens) + pairs, (
            "eager attention computes both triangles"
        )


def test_interleaved_counts_and_replicas_without_a_sequence() -> None:
    assert balance({0: 5}, 2, 100, multiple=2) == [[[0], []], [[], []]]
    assert [len(share) for share in balance(dict.fromkeys(range(5), 60), 2, 100, multiple=4)] == [
        4,
        4,
    ]


@pytest.mark.parametrize(("length", "needed"), [(300, 200), (200, 100), (150, 67), (110, 50)])
def test_sequences_that_are_alike_take_one_try(
    length: int, needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those a little over half of the budget each has a micro-batch of its own, which their
    tokens do not tell.
    """
    tried, spread = [], packing._spread
    monkeypatch.setattr(packing, "_spread", lambda *asked: tried.append(asked[1]) or spread(*asked))
    (share,) = balance(dict.fromkeys(range(200), length), 1, 478)
    assert [len(share)] == tried == [needed]


def test_pack_pads_every_sequence_for_context_ranks() -> None:
    sequences = ragged_sequences(5)
    batch = pack(sequences, [3, 0], {3: 0.5, 0: 0.25}, torch.device("cpu"), multiple=16, each=8)
    assert all(length % 8 == 0 for length in batch.lengths)
    assert batch.tokens.numel() % 16 == 0
    assert (batch.tokens[batch.rows + 1]).tolist() == batch.targets.tolist()
    empty = pack(sequences, [], {}, torch.device("cpu"), multiple=16, each=8)
    assert (empty.lengths, empty.rows.numel()) == ([16], 0)


def test_sequences_without_advantage_come_last_on_every_context_rank() -> None:
    drawn = ragged_sequences(5, shortest=30)
    sequences = [with_columns(s, advantage=0.0) if i in (0, 3) else s for i, s in enumerate(drawn)]
    batch = pack(sequences, [0, 4, 3, 1], dict.fromkeys(range(5), 1.0), torch.device("cpu"), 4, 4)
    assert batch.indices == [4, 1, 0, 3]
    assert batch.live == 2
    for part in [batch, *(context.part(batch, rank, 2) for rank in range(2))]:
        live = part.columns["advantage"] != 0
        assert live.tolist() == [True] * part.live_rows + [False] * (
            len(part.targets) - part.live_rows
        )
    unknown = pack(
        [replace(s, columns={}) for s in drawn], [0, 4], {0: 1.0, 4: 1.0}, torch.device("cpu")
    )
    assert (unknown.indices, unknown.live, unknown.live_rows) == (
        [0, 4],
        None,
        len(unknown.targets),
    )


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_context_parts_are_the_batch(ranks: int) -> None:
    """Every token and every row on exactly one rank, in the chunks r and 2 * ranks - 1 - r of its
    sequence.
    """
    sequences = ragged_sequences(6)
    batch = pack(
        sequences, [4, 1, 2], {4: 0.5, 1: 0.25, 2: 1.0}, torch.device("cpu"), 2 * ranks, 2 * ranks
    )
    batch.columns["advantage"] = torch.randn(len(batch.targets))
    parts = [context.part(batch, rank, ranks) for rank in range(ranks)]
    assert (
        {"weight", "advantage", "engine_logprob"} == batch.columns.keys() == parts[0].columns.keys()
    )
    pieces = [{"targets": part.targets, **part.columns} for part in parts]
    for name, wanted in {"targets": batch.targets, **batch.columns}.items():
        whole = torch.zeros_like(wanted)
        for rank, piece in enumerate(pieces):
            whole[context.own_rows(batch, rank, ranks)] += piece[name]
        assert torch.equal(whole, wanted), name
    place = context.rank_order(batch.lengths, ranks)
    assert torch.equal(torch.cat([part.tokens for part in parts])[place], batch.tokens)
    for rank, part in enumerate(parts):
        mine = context.own_rows(batch, rank, ranks)
        assert torch.equal(context.zigzag(batch.lengths, rank, ranks)[part.rows], batch.rows[mine])
        assert sum(part.row_lengths) == len(mine)
    first = batch.lengths[0] // (2 * ranks)
    held = context.zigzag(batch.lengths, 1, ranks)[: 2 * first].tolist()
    assert held == [
        *range(first, 2 * first),
        *range((2 * ranks - 2) * first, (2 * ranks - 1) * first),
    ]
    with pytest.raises(ValueError, match=rf"do not divide into {2 * ranks} chunks"):
        context.zigzag([2 * ranks + 1], 0, ranks)


def test_tokens_that_a_script_forced_weigh_nothing_and_no_weights_drew_them() -> None:
    """Two forced, three drawn, one that was written with a known chance, and is trained on."""
    parts = (
        Part("opening", 0, 2, "forced"),
        Part("thought", 2, 5, "until"),
        Part("mode", 5, 6, "chosen"),
    )
    logprobs = np.array([0, 0, -1, -2, -3, np.log(0.5)], np.float32)
    response = Response((1,) * 6, logprobs, "stop", (VersionSpan(7, 0, 6),), parts=parts)
    plain = Response((1,) * 6, logprobs, "stop", (VersionSpan(7, 0, 6),))
    group = Group(Prompt("p", (1, 2), "q", "1"), (response, plain))
    made = credited(group, [0.5, -0.5])
    scripted, drawn = samples([made])
    assert scripted.column("weight").tolist() == [0, 0, 1, 1, 1, 1]
    assert scripted.column("version").tolist() == [NOT_DRAWN, NOT_DRAWN, 7, 7, 7, NOT_DRAWN]
    assert (scripted.size.trained, drawn.size.trained) == (4, 6)
    assert drawn.column("version").tolist() == [7] * 6
    weight = (np.array([9.0, 9, 2, 2, 0, 2]), np.ones(6))
    weighed, _ = samples([Credited(made.rewarded, Credit(made.credit.advantage, weight=weight))])
    assert weighed.column("weight").tolist() == [0, 0, 2, 2, 0, 2]
