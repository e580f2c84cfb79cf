"""An iteration's figures from its groups, by hand; the identities that stop a run."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_efr.config import ModelConfig
from megatron_efr.evaluation.responses import repetition
from megatron_efr.run.iteration import IdentityError, check_identities, rollout_figures
from megatron_efr.steps import Part
from megatron_efr.types import (
    Credited,
    Grade,
    Graded,
    Group,
    Prompt,
    Response,
    Rewarded,
    VersionSpan,
)
from tests.groups import credited


def group(correct: list[bool], advantages: list[float], lengths: list[int]) -> Credited:
    responses = tuple(
        Response(tuple(range(n)), np.zeros(n, dtype=np.float32), "stop", (VersionSpan(0, 0, n),))
        for n in lengths
    )
    grades = tuple(Grade("correct" if right else "wrong") for right in correct)
    return credited(
        Graded(Group(Prompt("p", (1,), "q", "1"), responses), grades), advantages, correct
    )


def test_signal_and_the_sign_of_right_answers() -> None:
    groups = [
        # all right, told apart by length: one right answer is pushed down
        group([True, True], [0.5, -0.5], [3, 9]),
        group([False, False], [0.0, 0.0], [4, 4]),
        group([True, False], [1.0, -1.0], [5, 2]),
        group([True, True], [0.0, 0.0], [4, 4]),
    ]
    figures = rollout_figures(groups, version=0)
    assert figures["groups_all_right"] == 0.5
    assert figures["groups_all_wrong"] == 0.25
    assert figures["groups_without_signal"] == 0.5
    assert figures["right_with_negative_advantage"] == 1 / 5
    assert (figures["tokens_correct"], figures["tokens_wrong"]) == (5.0, pytest.approx(10 / 3))
    assert figures["repetition"] == 0.0
    nobody = rollout_figures([groups[1]], version=0)
    assert math.isnan(nobody["right_with_negative_advantage"])


def test_a_tokens_own_credit_is_a_signal() -> None:
    silent = group([True, True], [0.0, 0.0], [3, 2])
    spoken = Credited(
        silent.rewarded, silent.credit._replace(per_token=(np.zeros(3), np.array([0.0, 0.1])))
    )
    assert rollout_figures([silent, spoken], version=0)["groups_without_signal"] == 0.5


def test_accuracy_and_lengths_by_data_set() -> None:
    def of(dataset: str, *given: Any) -> Credited:
        made = group(*given)
        prompt = replace(made.group.prompt, meta={"dataset": dataset})
        graded = replace(made.graded, group=replace(made.group, prompt=prompt))
        return Credited(Rewarded(graded, made.rewarded.rewards), made.credit)

    figures = rollout_figures(
        [
            of("easy", [True, True], [0.5, -0.5], [3, 9]),
            of("hard", [False, False], [0.0, 0.0], [7, 4]),
            of("easy", [True, False], [1.0, -1.0], [6, 2]),
            group([False, True], [0.0, 0.0], [50, 60]),  # of no data set that is known
        ],
        version=0,
    )
    assert {name: figures[name] for name in figures if "/" in name and not name.startswith("graded/")} == {
        "accuracy/easy": 0.75, "tokens_mean/easy": 5.0, "tokens_correct/easy": 6.0,
        "tokens_wrong/easy": 2.0,
        "accuracy/hard": 0.0, "tokens_mean/hard": 5.5,
        "tokens_correct/hard": pytest.approx(math.nan, nan_ok=True),
        "tokens_wrong/hard": 5.5,
    }  # fmt: skip


def test_staleness_is_a_mean_over_the_tokens_that_versions_drew() -> None:
    """Forced ones before and after them count on neither side."""
    spans = (VersionSpan(4, 2, 4), VersionSpan(5, 4, 8))
    parts = (Part("opening", 0, 2, "forced"), Part("response", 2, 8, "stop"))
    response = Response(tuple(range(8)), np.zeros(8, np.float32), "stop", spans, parts=parts)
    found = rollout_figures(
        [credited(Group(Prompt("p", (1,), "", ""), (response,) * 2), np.array([1.0, -1.0]))], 5
    )
    assert (found["staleness_mean"], found["staleness_max"]) == (2 / 6, 1.0)


def test_repetition_is_the_share_of_runs_seen_before() -> None:
    assert repetition(range(7)) == 0.0
    assert repetition(range(100)) == 0.0
    assert repetition([5] * 20) == 1 - 1 / 13
    # 16 tokens twice: 25 runs, of which the last 9 stood there before
    assert repetition([*range(16), *range(16)]) == pytest.approx(9 / 25)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, 2000).tolist()
    seen = {tuple(tokens[i : i + 8]) for i in range(1993)}
    assert repetition(tokens) == pytest.approx(1 - len(seen) / 1993)


def figures(**changes: float) -> dict[str, float]:
    return {"first_ratio_max": 1.0, "first_kl_to_old": 0.0, "kl": 0.0} | changes


@pytest.mark.parametrize(
    ("name", "dtype", "off"),
    [(name, dtype, off) for name in ("first_ratio_max", "first_kl_to_old", "kl")
     for dtype, off in (("float32", 2e-5), ("bfloat16", 2e-2))],
)  # fmt: skip
def test_a_first_update_that_sees_another_policy_stops_the_run(
    name: str, dtype: str, off: float
) -> None:
    model = ModelConfig(path="m", dtype=dtype)  # type: ignore[arg-type]
    for found in (off, off / 10):
        metrics = figures()
        metrics[name] += found
        if found == off:
            with pytest.raises(
                IdentityError, match=rf"iteration 1: {name} is off by {off:g}.*{dtype}"
            ):
                check_identities(metrics, model, 1)
        else:
            check_identities(metrics, model, 1)


def test_what_is_no_identity_stops_nothing() -> None:
    model = ModelConfig(path="m")
    check_identities(figures(kl=0.3), model, 2)  # the policy has moved
    check_identities(figures(kl=0.3), model.model_copy(update={"routing": "replay"}), 1)
    check_identities({key: value for key, value in figures().items() if key != "kl"}, model, 1)
    check_identities(figures(first_ratio_max=math.nan), model, 1)  # a skipped update's
    check_identities(figures(first_ratio_max=0.0), model, 1)  # of an update that trains on nothing
