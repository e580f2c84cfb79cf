"""Evaluation records and summary.json: figures against hand-computed ones, JSON-ready, base
first.
"""

import json

import pytest

from megatron_efr.evaluate import describe
from megatron_efr.evaluation.records import summarise
from megatron_efr.report import build_summary, over_seeds, summary_markdown
from megatron_efr.types import Prompt
from tests.groups import graded

pytestmark = pytest.mark.alike


def group(index, correct, lengths, dataset="A", difficulty=None, text="answer"):
    meta = {"dataset": dataset, "question": f"Q{index}?"} | (
        {} if difficulty is None else {"difficulty": difficulty}
    )
    finish = ["stop" if n < 50 else "length" for n in lengths]
    return graded(
        correct,
        lengths,
        finish,
        text=text,
        prompt=Prompt(f"p{index}", (1,), "rendered", "42", meta),
    )


GROUPS = [
    group(0, [1, 1, 0, 0], [10, 20, 30, 40], difficulty=2),
    group(1, [1, 1, 1, 1], [10, 10, 10, 10], difficulty=2),
    group(2, [0, 0, 0, 0], [50, 50, 30, 30], dataset="B", difficulty=10),
]
ANSWERS = [["5", "5", "7", "7"], ["5"] * 4, [None, None, "1", "2"]]


def test_a_record_holds_the_figures_of_all_and_of_each_dataset():
    record = summarise(GROUPS, "m", answers=ANSWERS)
    assert (record["problems"], record["samples"]) == (3, 12)
    assert record["accuracy"] == 0.5
    assert record["tokens"] == pytest.approx((25 + 10 + 40) / 3)
    assert record["accuracy_ci"][0] < 0.5 < record["accuracy_ci"][1]
    assert record["tokens_right"] == pytest.approx((10 + 20 + 40) / 6)
    assert record["tokens_wrong"] == pytest.approx((30 + 40 + 160) / 6)
    assert record["tokens_by_difficulty"] == {"2": 17.5, "10": 40.0}
    assert record["accuracy_by_difficulty"] == {"2": 0.75, "10": 0.0}
    assert record["truncated"] == pytest.approx((0 + 0 + 2 / 4) / 3)
    assert record["pass_at_k"] == pytest.approx({"1": 0.5, "2": (5 / 6 + 1) / 3, "4": 2 / 3})
    assert record["majority"] == pytest.approx((0.5 + 1 + 0) / 3)
    # by hand: 2 / ln 15 against 2 / ln 35; one answer; 1 / ln 30 each of two wrong ones
    assert record["shortest_majority"] == pytest.approx((1 + 1 + 0) / 3)
    assert record["tokens_per_right_answer"] == pytest.approx(50.0)
    assert record["datasets"]["A"]["accuracy"] == 0.75
    assert record["datasets"]["B"]["tokens"] == 40.0
    assert record["datasets"]["B"]["tokens_per_right_answer"] is None
    json.dumps(record, allow_nan=False)


def test_a_record_keeps_a_row_for_each_problem_and_clips_what_is_too_long_to_read():
    record = summarise([group(0, [1, 0], [3, 4], text="a" * 5000 + "z" * 5000)], "m", shown=1)
    (row,) = record["rows"]
    assert (row["id"], row["question"], row["gold"], row["difficulty"]) == ("p0", "Q0?", "42", None)
    assert (row["correct"], row["tokens"]) == ([True, False], [3, 4])
    (text,) = row["responses"]
    assert text.startswith("a" * 3000 + "\n[... 4000 characters left out")
    assert text.endswith("z" * 3000)
    assert record["majority"] is None


def test_problems_that_were_left_out_stand_in_record_and_report():
    record = summarise(GROUPS, "m", left_out={"A": 1200, "B": 1})
    assert record["left_out"] == {"A": 1200, "B": 1}
    shown = summary_markdown(build_summary({"m": record}, {"m": None}, {}))
    said = (
        "Left out, since the prompt is longer than prompt.max_tokens: 1,201 problems, 1,200 of A, "
        "1 of B."
    )
    assert said in shown
    assert said in describe(record)
    assert "Left out" not in summary_markdown(
        build_summary({"m": summarise(GROUPS, "m")}, {"m": None}, {})
    )
    del record["left_out"]  # a record of before it was counted
    assert "Left out" not in summary_markdown(build_summary({"m": record}, {"m": None}, {}))


def test_nothing_right_has_an_interval_that_says_how_little_that_is():
    record = summarise([group(i, [0], [9]) for i in range(30)], "m")
    assert record["accuracy_ci"] == pytest.approx([0.0, 0.1135], abs=1e-4)


def test_nothing_to_summarise_is_an_error():
    with pytest.raises(ValueError, match="no problems"):
        summarise([], "m")
    with pytest.raises(ValueError, match="answers to 1 problems, and 3"):
        summarise(GROUPS, "m", answers=[["1"]])


def test_the_summary_has_the_base_first_and_then_every_alpha_in_order():
    records = {name: summarise(GROUPS, name) for name in ("b", "a4", "a0")}
    seconds = {"sft": 1.0, "rl": 2.0, "evaluate": 3.0, "total": 6.0}
    summary = build_summary(records, {"a4": 0.4, "a0": 0.0, "b": None}, seconds)
    assert [(model["name"], model["alpha"]) for model in summary["models"]] == [
        ("b", None),
        ("a0", 0.0),
        ("a4", 0.4),
    ]
    assert summary["seconds"] == seconds
    keys = {
        "name",
        "alpha",
        "accuracy",
        "accuracy_ci",
        "tokens",
        "tokens_ci",
        "tokens_by_difficulty",
    }
    assert keys <= set(summary["models"][0])
    with pytest.raises(ValueError, match="no evaluation of a1; there are: a0, a4, b"):
        build_summary(records, {"a1": 0.1}, seconds)


def summary(accuracy, tokens, total):
    levels = {"2": tokens / 2, "10": tokens}
    models = [
        {
            "name": "base",
            "alpha": None,
            "accuracy": 0.7,
            "tokens": 50.0,
            "tokens_by_difficulty": levels,
            "problems": 9,
        },
        {
            "name": "x",
            "alpha": 0.1,
            "accuracy": accuracy,
            "tokens": tokens,
            "tokens_by_difficulty": levels,
        },
    ]
    return {"models": models, "seconds": {"total": total}}


def test_seeds_are_put_together_as_mean_and_deviation():
    merged = over_seeds(
        [summary(0.90, 30.0, 100.0), summary(0.94, 34.0, 200.0), summary(0.92, 38.0, 300.0)]
    )
    base, trained = merged["models"]
    assert merged["seeds"] == 3
    assert merged["seconds"] == {"total": 200.0}
    assert trained["accuracy"] == pytest.approx(0.92)
    assert trained["accuracy_sd"] == pytest.approx(0.02)
    assert (trained["tokens"], trained["tokens_sd"]) == pytest.approx((34.0, 4.0))
    assert trained["tokens_by_seed"] == [30.0, 34.0, 38.0]
    assert trained["tokens_by_difficulty"] == {"2": 17.0, "10": 34.0}
    assert base["tokens_sd"] == 0.0
    assert over_seeds([summary(0.9, 30.0, 1.0)])["models"][1]["accuracy_sd"] is None
    other = summary(0.9, 30.0, 1.0)
    other["models"].pop()
    with pytest.raises(ValueError, match="one family"):
        over_seeds([summary(0.9, 30.0, 1.0), other])


def test_the_markdown_table_for_the_readme():
    merged = over_seeds([summary(0.90, 30.0, 1.0), summary(0.94, 34.0, 1.0)])
    assert summary_markdown(merged) == (
        "| model | accuracy | mean tokens | tokens against base |\n"
        "|---|---:|---:|---:|\n"
        "| base | 70.0% ± 0.0 | 50.0 ± 0.0 |  |\n"
        "| alpha 0.1 | 92.0% ± 2.8 | 32.0 ± 2.8 | −36% |\n"
        "\nMean ± standard deviation over 2 seeds.\n"
    )
