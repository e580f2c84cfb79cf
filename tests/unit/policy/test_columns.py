"""Columns: what is declared goes everywhere unharmed, and credits of responses and tokens become
columns.
"""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_efr.errors import UserError
from megatron_efr.policy import context
from megatron_efr.policy.packing import pack, samples
from megatron_efr.policy.scatter import flatten, unflatten
from megatron_efr.samples import COLUMNS, NOT_DRAWN, Column, Sample, SequenceSize
from megatron_efr.types import (
    Branch,
    Credit,
    Credited,
    Group,
    Part,
    Prompt,
    Response,
    Rewarded,
    VersionSpan,
)
from tests.conftest import ragged_sequences
from tests.groups import credited, sample, with_columns

CPU = torch.device("cpu")


def test_a_declared_column_is_scattered_packed_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new quantity is one line of COLUMNS: nothing else knows its name."""
    monkeypatch.setitem(COLUMNS, "surprise", Column("surprise", np.int64))
    rng = np.random.default_rng(0)
    given = [
        with_columns(s, surprise=rng.integers(2**40, 2**41, s.response_length))
        for s in ragged_sequences(9)
    ]
    drawn = unflatten(flatten(given))
    ranks, chosen = 2, [5, 0, 7, 2]
    batch = pack(drawn, chosen, dict.fromkeys(chosen, 1.0), CPU, 2 * ranks, 2 * ranks)
    wanted = np.concatenate([given[i].columns["surprise"] for i in batch.indices])
    assert batch.columns["surprise"].dtype == torch.int64
    assert batch.columns["surprise"].tolist() == wanted.tolist()
    whole = torch.zeros(len(wanted), dtype=torch.int64)
    for rank in range(ranks):
        whole[context.own_rows(batch, rank, ranks)] += context.part(batch, rank, ranks).columns[
            "surprise"
        ]
    assert whole.tolist() == wanted.tolist()
    assert "surprise" not in pack(ragged_sequences(2), [0, 1], {0: 1.0, 1: 1.0}, CPU).columns, (
        "nobody said it"
    )


def test_a_default_stands_where_a_sample_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COLUMNS, "surprise", Column("surprise", np.float32, -7.0))
    drawn = [sample([1, 2, 3, 4], 2), sample([1, 2, 3], 1, surprise=[0.5, 1.5])]
    batch = pack(unflatten(flatten(drawn)), [0, 1], {0: 1.0, 1: 1.0}, CPU)
    assert batch.columns["surprise"].tolist() == [-7.0, -7.0, 0.5, 1.5]
    assert pack(drawn, [], {}, CPU).columns["surprise"].tolist() == []


def test_an_unknown_column_or_a_wrong_length_is_refused() -> None:
    with pytest.raises(
        ValueError, match="no column 'advantages' is declared; there are advantage, weight"
    ):
        Sample(np.arange(3), 1, {"advantages": np.zeros(2)})
    with pytest.raises(ValueError, match=r"column weight is \[3\], of 2 response tokens"):
        Sample(np.arange(3), 1, {"weight": np.zeros(3)})


def test_samples_come_back_exactly_from_flat_tensors() -> None:
    rng = np.random.default_rng(0)
    given = [
        replace(
            with_columns(s, version=rng.integers(-1, 2**31 - 1, s.response_length)),
            routed_experts=rng.integers(0, 60000, (s.length - 1, 3, 2)).astype(np.uint16)
            if s.length % 2
            else None,
        )
        for s in ragged_sequences(20)
    ]
    given += [sample([1, 2, 2**31 - 1], 1), sample([1], 1, advantage=[], weight=[])]
    back = unflatten(flatten(given))
    assert len(back) == len(given)
    for one, other in zip(given, back, strict=True):
        assert (one.prompt_length, one.columns.keys()) == (
            other.prompt_length,
            other.columns.keys(),
        )
        pairs = [
            (one.tokens, other.tokens),
            *((one.columns[name], other.columns[name]) for name in one.columns),
        ]
        assert all(np.array_equal(a, b) for a, b in pairs)
        assert all(other.columns[name].dtype == COLUMNS[name].dtype for name in other.columns)
        assert (one.routed_experts is None) == (other.routed_experts is None)
        if one.routed_experts is not None and other.routed_experts is not None:
            assert other.routed_experts.dtype == np.uint16
            assert np.array_equal(one.routed_experts, other.routed_experts)
    assert unflatten(flatten([])) == []


def test_a_prompts_id_is_a_checksum_of_its_tokens_alone() -> None:
    """In any width, whatever the response: ranks that deal alike must find the same."""
    narrow, wide = (
        Sample(np.array([1, 2, 258, *response], dtype), 3)
        for response, dtype in (((7, 8), np.int32), ((9,), np.int64))
    )
    written = bytes([1, 0, 0, 0, 2, 0, 0, 0, 2, 1, 0, 0])
    assert narrow.size.prompt_id == wide.size.prompt_id == zlib.crc32(written)
    assert Sample(np.array([1, 2, 259, 7], np.int32), 3).size.prompt_id != narrow.size.prompt_id


def group() -> Group:
    spans = (VersionSpan(4, 0, 1), VersionSpan(5, 2, 3))
    responses = (
        Response((5, 6, 7), np.array([-1.0, -2.0, -3.0], np.float32), "stop", spans),
        Response((8, 9), np.array([-0.5, -0.25], np.float32), "stop"),
    )
    return Group(Prompt("p", (1, 2), "q", "1"), responses)


def with_credit(**fields: object) -> Credited:
    return Credited(credited(group(), [0.0, 0.0]).rewarded, Credit(**fields))  # type: ignore[arg-type]


def test_credits_become_columns() -> None:
    per_token = (np.array([0.5, 0.0, -0.5]), np.array([1.0, 2.0]))
    weight = (np.array([1.0, 0.0, 0.25]), np.array([2.0, 1.0]))
    masked = np.array([False, True])
    one, other = samples(
        [
            with_credit(
                advantage=np.array([1.0, -1.0]), per_token=per_token, weight=weight, masked=masked
            )
        ]
    )
    assert one.tokens.tolist() == [1, 2, 5, 6, 7]
    assert {name: values.tolist() for name, values in one.columns.items()} == {
        "advantage": [1.5, 1.0, 0.5], "weight": [1.0, 0.0, 0.25],
        "engine_logprob": [-1.0, -2.0, -3.0],
        "version": [4, NOT_DRAWN, 5],
    }  # fmt: skip
    assert one.size == SequenceSize(2, 3, 2, one.size.prompt_id)
    assert other.columns["weight"].tolist() == [0.0, 0.0], (
        "masked: whatever the method says of its tokens"
    )
    assert other.columns["advantage"].tolist() == [0.0, 1.0]
    assert other.size == SequenceSize(2, 2, 0, one.size.prompt_id)
    plain, _ = samples([with_credit(advantage=np.array([0.1 + 0.2, 0.0]))])
    assert plain.columns.keys() == {"advantage", "engine_logprob", "version"}
    assert set(plain.columns["advantage"].tolist()) == {float(np.float32(0.1 + 0.2))}


def test_answers_of_branches_become_samples() -> None:
    """Behind prompt and beginning, which is read alone, or trained on but for what a script
    forced.
    """
    parts = (Part("opening", 0, 1, "forced"), Part("thought", 1, 4, "stop"))
    answers = [
        Response((20 + k, 30 + k), np.array([0.0, -0.5 - k], np.float32), "length",
            (VersionSpan(6, 0, 2),),
                 parts=(Part("exit", 0, 1, "forced"), Part("answer", 1, 2, "length")))
        for k in range(3)
    ]  # fmt: skip
    branches = (Branch("exit", 2, (answers[0], answers[1])), Branch("exit", 3, (answers[2],)))
    logprobs = np.array([0.0, -1.0, -2.0, -3.0], np.float32)
    whole = Response(
        (5, 6, 7, 8), logprobs, "stop", (VersionSpan(5, 0, 4),), parts=parts, branches=branches
    )
    base = credited(Group(Prompt("p", (1, 2), "q", "1"), (whole, whole)), [0.5, 0.0]).rewarded
    given = Credit(np.array([0.5, 0.0]), branches=(np.array([1.0, 2.0, 3.0]), np.zeros(0)))

    made = samples([Credited(base, given)])
    assert len(made) == 5, "the second response's answers are left out"
    assert made[0].columns["advantage"].tolist() == [0.5] * 4
    for k, at in enumerate((2, 2, 3)):
        one = made[1 + k]
        assert one.tokens.tolist() == [1, 2, *(5, 6, 7, 8)[:at], 20 + k, 30 + k]
        assert (one.prompt_length, one.size) == (
            2 + at,
            SequenceSize(2 + at, 2, 1, one.size.prompt_id),
        )
        assert {name: one.column(name).tolist() for name in one.columns} == {
            "advantage": [k + 1.0] * 2, "weight": [0.0, 1.0], "engine_logprob": [0.0, -0.5 - k],
            "version": [NOT_DRAWN, 6],
        }  # fmt: skip

    made = samples([Credited(base, given._replace(beginnings=True))])
    one = made[3]
    assert (one.prompt_length, one.size) == (2, SequenceSize(2, 5, 3, one.size.prompt_id))
    assert {name: one.column(name).tolist() for name in one.columns} == {
        "advantage": [3.0] * 5, "weight": [0.0, 1.0, 1.0, 0.0, 1.0],
        "engine_logprob": [0.0, -1.0, -2.0, 0.0, -2.5],
        "version": [NOT_DRAWN, 5, 5, NOT_DRAWN, 6],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"advantage": np.zeros(3)},
            r"prompt p: advantage is \[3\], and the group has 2 responses",
        ),
        ({"masked": np.zeros(1, bool)}, r"masked is \[1\]"),
        (
            {"per_token": (np.zeros(3),)},
            r"per_token is \[3\], and the responses have \[3, 2\] tokens",
        ),
        (
            {"weight": (np.zeros(3), np.zeros(3))},
            r"weight is \[3\], \[3\], and the responses have \[3, 2\] tokens",
        ),
        (
            {"branches": (np.zeros(1), np.zeros(0))},
            r"branches is of \[1, 0\] advantages, and the .* have \[0, 0\]",
        ),
        (
            {"weight": (np.ones(3), np.array([1.0, -0.5]))},
            r"a weight of response 1 is negative or not finite",
        ),
        (
            {"weight": (np.array([1.0, np.nan, 1.0]), np.ones(2))},
            r"a weight of response 0 is negative or not finite",
        ),
    ],
)
def test_a_credit_that_does_not_fit_its_group_is_refused(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        with_credit(**({"advantage": np.zeros(2)} | fields))
    assert isinstance(with_credit(advantage=np.zeros(2)).rewarded, Rewarded)
