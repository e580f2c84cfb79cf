"""The report's sections: the front, budgets, lengths, what differs between runs; each from the
records alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from megatron_efr.evaluation.records import Record, summarise
from megatron_efr.report.__main__ import _members, _renamed, gather_seeds
from megatron_efr.report.differences import differences, student
from megatron_efr.report.records import Listed, build_summary, family_summary, summary_markdown
from megatron_efr.report.results import Results
from megatron_efr.report.sections import (
    apart,
    budgets,
    difficulty,
    family,
    lengths,
    made,
    problem,
    training,
)
from megatron_efr.report.sentences import front, headline
from megatron_efr.report.stored import read_summary
from megatron_efr.run.folder import RunFolder
from megatron_efr.types import Prompt
from tests.groups import graded

pytestmark = pytest.mark.alike

LIMIT = 64
SAMPLES = {
    "base": [([1, 0], [60, 64]), ([1, 1], [30, 40]), ([0, 1], [64, 20])],
    "a_seed-1": [([1, 1], [10, 33]), ([1, 0], [8, 60]), ([1, 1], [30, 30])],
    "a_seed-2": [([1, 1], [5, 30]), ([1, 1], [9, 40]), ([0, 1], [33, 30])],
    "b": [([0, 0], [4, 4]), ([1, 0], [4, 8]), ([0, 0], [3, 2])],
}
MODELS = [
    Listed("base", "base", ("base",), "base"),
    Listed("a", "method a", ("a_seed-1", "a_seed-2"), "base"),
    Listed("b", "b", ("b",), "base"),
]


def record(name: str, gold: str = "7") -> Record:
    groups = [
        graded(
            rights,
            tokens,
            text=f"{name} </think>so",
            prompt=Prompt(f"p{i}", (1,), "", gold, {"difficulty": i % 2}),
        )
        for i, (rights, tokens) in enumerate(SAMPLES[name])
    ]
    return summarise(groups, name, protocol={"max_new_tokens": LIMIT, "temperature": 1.0})


@pytest.fixture
def results(tmp_path: Path) -> Results:
    records = {name: record(name) for name in SAMPLES}
    lines = [{"step": s, "accuracy": 0.5, "tokens_mean": 9.0} for s in (1, 2)]
    configs = {
        name: (f"name: {name}\nseed: {i}\nmethod: {{name: efr}}\n")
        for i, name in enumerate(list(SAMPLES)[1:])
    }
    summary = family_summary(records, MODELS, {"total": 3.0})
    return Results(summary, records, dict.fromkeys(configs, lines), tmp_path, configs)


def block(found: dict[str, Any] | str) -> dict[str, Any]:
    assert isinstance(found, dict), found
    return found


def within(name: str, budget: int) -> float:
    """Mean over problems of the share that is right and no longer."""
    shares = [
        np.mean([r and t <= budget for r, t in zip(*each, strict=True)]) for each in SAMPLES[name]
    ]
    return float(np.mean(shares))


def test_budgets_are_the_shares_that_are_right_and_no_longer(results: Results) -> None:
    found = block(budgets.build(results))
    assert found["budgets"] == [4, 8, 16, 32, LIMIT]
    rows = {row[0]: row[1:] for row in found["rows"]}
    for name in ("base", "b"):
        shown = [float(text.partition("%")[0]) for text in rows[name]]
        assert shown == pytest.approx(
            [100 * within(name, budget) for budget in found["budgets"]], abs=0.05
        )
    for text, budget in zip(rows["method a"], found["budgets"], strict=True):
        both = [100 * within(f"a_seed-{seed}", budget) for seed in (1, 2)]
        expected = [
            np.mean(both),
            np.mean(both) - np.std(both, ddof=1),
            np.mean(both) + np.std(both, ddof=1),
        ]
        assert [float(n) for n in re.findall(r"-?\d+\.\d", text)] == pytest.approx(
            expected, abs=0.06
        )
    older = Results(
        results.summary,
        {n: {**r, "measures": {}} for n, r in results.evaluations.items()},
        {},
        results.out,
    )
    assert "no figures at hard budgets" in str(budgets.build(older))


@pytest.mark.parametrize("shared", [True, False], ids=["same problems", "others of the same name"])
def test_families_of_several_seeds_have_the_budgets_of_all_of_them(
    shared: bool, tmp_path: Path
) -> None:
    """A problem that both seeds ask is one problem, not two; another one has a name of its own."""
    golds = ("7", "7" if shared else "8")
    for seed, trained, gold in zip(
        ("seed-2", "seed-10"), ("a_seed-1", "a_seed-2"), golds, strict=True
    ):
        records = {"base": record("base", gold), "alpha-0.1": record(trained, gold)}
        own = RunFolder(tmp_path / seed)
        own.write_summary(build_summary(records, {"base": None, "alpha-0.1": 0.1}, {}))
        for name, each in records.items():
            own.write_evaluation(name, each)
    folder = RunFolder(tmp_path)
    gather_seeds(folder)
    evaluations, summary = folder.read_evaluations(), read_summary(folder.summary)
    assert set(evaluations) == {"base", "base.seed-10", "alpha-0.1", "alpha-0.1.seed-10"}
    names = ["p0", "p1", "p2"]
    assert [row["id"] for row in evaluations["base"]["rows"]] == names
    others = names if shared else [f"seed-10/{name}" for name in names]
    for run in ("base.seed-10", "alpha-0.1.seed-10"):
        assert [row["id"] for row in evaluations[run]["rows"]] == others
    both = Results(summary, evaluations, {}, tmp_path)
    together = difficulty._together(both.records(summary["models"][1]))
    assert len(together["rows"]) == len({*names, *others})
    found = block(budgets.build(both))
    shown = [float(text.partition("%")[0]) for text in found["rows"][1][1:]]
    shares = [
        np.mean([within(name, n) for name in ("a_seed-1", "a_seed-2")]) for n in found["budgets"]
    ]
    assert shown == pytest.approx([100 * share for share in shares], abs=0.05)


def test_a_problem_has_one_name_in_all_seeds_that_ask_it() -> None:
    names: dict[tuple[str, str, str], str] = {}
    seeds = {"seed-1": "7", "seed-2": "8", "seed-3": "8", "seed-4": "7", "seed-5": "9"}
    given = [
        _renamed({"rows": [{"id": "p", "question": "?", "gold": gold}]}, seed, names)["rows"]
        for seed, gold in seeds.items()
    ]
    assert [row["id"] for [row] in given] == ["p", "seed-2/p", "seed-2/p", "p", "seed-5/p"]


def test_the_runs_of_a_family_over_seeds_are_those_of_its_first_seed(tmp_path: Path) -> None:
    for seed in ("seed-2", "seed-10"):
        own = RunFolder(tmp_path / seed)
        own.write_summary(build_summary({"a": record("b")}, {"a": None}, {}))
        (own.path / "a").mkdir()
        (own.path / "a/config.yaml").write_text("")
    folder = RunFolder(tmp_path)
    gather_seeds(folder)
    summary = read_summary(folder.summary)
    assert [run.path for run in _members(folder, summary)] == [tmp_path / "seed-2/a"]


def test_the_front_has_whom_nobody_beats_in_both(results: Results) -> None:
    assert [model["name"] for model in front(results.models)] == ["b", "a"]
    equal = [
        {"accuracy": accuracy, "tokens": tokens}
        for accuracy, tokens in ((0.5, 9), (0.7, 9), (0.7, 12), (0.6, 8))
    ]
    assert front(equal) == [equal[3], equal[1]]
    found = block(family.build(results))
    assert found["front"].startswith("The line is the front: b, method a.")
    assert [row["on_front"] for row in found["rows"]] == [False, True, True]
    base, trained = found["rows"][0], found["rows"][1]
    assert base["against"] == ""
    tokens = [
        np.mean([np.mean(each) for _, each in SAMPLES[name]])
        for name in ("base", "a_seed-1", "a_seed-2")
    ]
    share = np.mean(tokens[1:]) / tokens[0] - 1
    assert trained["against"] == f"{100 * share:+.0f}%".replace("-", "−")
    assert trained["tokens"][1] == f"± {np.std(tokens[1:], ddof=1):.1f}"
    assert "Mean ± standard deviation over 2 seeds. In brackets, of one run: 95%" in found["spread"]
    assert "| method a | " in summary_markdown(results.summary)


def test_lengths_are_told_of_right_and_of_wrong_responses_of_all_seeds(results: Results) -> None:
    rows = {row[0]: row[1:] for row in block(lengths.build(results))["rows"]}
    pairs = [
        pair
        for name in ("a_seed-1", "a_seed-2")
        for each in SAMPLES[name]
        for pair in zip(*each, strict=True)
    ]
    for text, right in zip(rows["method a"], (1, 0), strict=True):
        own = [tokens for value, tokens in pairs if value == right]
        low, middle, high = np.percentile(own, [10, 50, 90])
        assert text == f"{middle:.0f} [{low:.0f}, {high:.0f}] of {len(own)}"


def test_a_large_family_is_numbered_and_its_lines_are_those_of_the_front(results: Results) -> None:
    more = [Listed(f"m{i}", f"m{i}", (f"m{i}",), "base") for i in range(9)]
    records = {**results.evaluations, **{model.name: results.evaluations["b"] for model in more}}
    summary = family_summary(records, [*MODELS, *more], {})
    for place, model in enumerate(summary["models"][3:]):
        model["accuracy"], model["tokens"] = 0.01, 500.0 + place
    large = Results(summary, records, results.metrics, results.out, results.configs)
    assert [model["name"] for model in large.shown] == ["base", "a", "b"]
    assert large.choice.endswith("on the front: base, method a, b. The tables have all.")
    found = block(family.build(large))
    assert found["numbered"]
    assert [row["number"] for row in found["rows"]] == list(range(1, 13))
    assert len(block(difficulty.build(large))["rows"]) == 12
    assert [text for text, _ in block(training.build(large))["key"]] == ["method a", "b"]


def test_what_differs_between_runs_is_said_and_nothing_else(results: Results) -> None:
    assert made.differences(results.configs) == [
        ("a_seed-1", "seed = 0"),
        ("a_seed-2", "seed = 1"),
        ("b", "seed = 2"),
    ]
    assert made.differences({"a": "x: 1", "b": "x: [", "c": ("x: 1\ny: {z: t}")}) == [
        ("a", ""),
        ("c", 'y.z = "t"'),
    ]
    assert made.differences({"a": "x: 1"}) == []
    [protocol] = block(made.build(results))["protocols"]
    assert protocol == f"max_new_tokens = {LIMIT}, temperature = 1.0"


def test_thinking_ends_with_its_mark_or_before_the_last_box(results: Results) -> None:
    assert problem.split("a </think>\n\nb \\boxed{1}") == ("a </think>", "b \\boxed{1}")
    assert problem.split("1 \\boxed{2} wait \\boxed{3}.") == ("1 \\boxed{2} wait ", "\\boxed{3}.")
    assert problem.split("\\boxed{3}") == ("", "\\boxed{3}")
    assert problem.split("no answer") == ("", "no answer")
    assert problem.split("a </think> b [done] c", "[done]") == ("a </think> b [done]", " c")
    answers = block(problem.build(results))["problems"][0]["answers"]
    assert [(each["label"], each["thinking"], each["text"]) for each in answers][1] == (
        "method a",
        "a_seed-1 </think>",
        "so",
    )


@pytest.mark.parametrize("freedom", [1, 2, 3, 10, 54, 400])
@pytest.mark.parametrize("chance", [0.9, 0.975, 0.9995])
def test_student_s_quantiles_are_scipy_s(chance: float, freedom: int) -> None:
    assert student(chance, freedom) == pytest.approx(stats.t.ppf(chance, freedom), rel=1e-4)


def test_intervals_of_differences_are_those_of_pooled_deviations() -> None:
    values = {"r": [1.0, 2.0, 4.0], "a": [5.0, 5.5], "b": [1.0, 3.0, 2.0]}
    found = differences(values, "r", 4)
    pooled = sum(np.var(own, ddof=1) * (len(own) - 1) for own in values.values()) / 5
    for name in ("a", "b"):
        middle = np.mean(values[name]) - np.mean(values["r"])
        reach = stats.t.ppf(1 - 0.05 / 8, 5) * np.sqrt(pooled * (1 / len(values[name]) + 1 / 3))
        assert found[name] == pytest.approx((middle, middle - reach, middle + reach), rel=1e-4)
    two = differences({"r": [1.0, 2.0, 4.0], "b": [2.0, 3.5, 7.0]}, "r", 1)["b"]
    p = stats.ttest_ind([2.0, 3.5, 7.0], [1.0, 2.0, 4.0]).confidence_interval(0.95)
    assert two[1:] == pytest.approx((p.low, p.high), rel=1e-4)


def test_equal_models_are_told_apart_as_seldom_as_it_is_said() -> None:
    rng = np.random.default_rng(0)
    families = [{f"m{i}": list(rng.normal(size=3)) for i in range(6)} for _ in range(400)]
    wrong = [
        any(each.side for each in differences(family, "m0", 5).values()) for family in families
    ]
    assert 0.0 < np.mean(wrong) < 0.08


def test_what_is_apart_is_said_of_models_of_several_seeds(tmp_path: Path) -> None:
    def model(name: str, accuracy: list[float], tokens: list[float]) -> Record:
        means = {
            "accuracy": np.mean(accuracy),
            "tokens": np.mean(tokens),
            "tokens_by_difficulty": {},
        }
        return {
            "name": name,
            "label": name,
            "base": "base",
            "accuracy_by_seed": accuracy,
            "tokens_by_seed": tokens,
            **means,
        }

    models = [
        {
            "name": "base",
            "label": "base",
            "base": "base",
            "accuracy": 0.5,
            "tokens": 60.0,
            "tokens_by_difficulty": {},
        },
        model("plain", [0.80, 0.82, 0.81], [50.0, 51.0, 52.0]),
        model("brief", [0.80, 0.81, 0.82], [30.0, 31.0, 32.0]),
        model("worse", [0.60, 0.62, 0.61], [50.0, 52.0, 51.0]),
    ]
    found = block(apart.build(Results({"models": models, "seconds": {}}, {}, {}, tmp_path)))
    assert found["reference"] == "plain"
    assert found["sentence"].startswith(
        "Of 2 models, 1 are briefer than plain beyond chance and 0 longer; 0 are more"
    )
    ends = [[text.rpartition(": ")[2] for text in row[1:]] for row in found["rows"]]
    assert ends == [["not told apart", "briefer"], ["less accurate", "not told apart"]]
    assert found["rows"][1][1].startswith("−20.0 points [")
    against = Results({"models": models, "seconds": {}, "against": "brief"}, {}, {}, tmp_path)
    assert [row[2].rpartition(": ")[2] for row in block(apart.build(against))["rows"]] == [
        "longer",
        "longer",
    ]
    assert "no base" in str(
        apart.build(Results({"models": models[1:2], "seconds": {}}, {}, {}, tmp_path))
    )


def test_models_of_one_run_are_compared_with_the_base_problem_by_problem(results: Results) -> None:
    found = block(apart.build(results))
    assert found["reference"] == "base"
    assert "training's chance is not in them" in found["sentence"]
    rows = {row[0]: row[1:] for row in found["rows"]}
    for name, run in (("method a", "a_seed-1"), ("b", "b")):
        for text, column, scale in zip(rows[name], (0, 1), (100, 1), strict=True):
            means = [
                np.mean([np.mean(each[column]) for each in SAMPLES[key]]) for key in (run, "base")
            ]
            value, low, high = (
                float(n.replace("−", "-")) for n in re.findall(r"[+−]\d+\.\d", text)
            )
            assert value == pytest.approx(scale * (means[0] - means[1]), abs=0.06)
            assert low <= value <= high
    assert rows["b"][1].endswith("briefer")
    other = {**results.evaluations, "a_seed-1": record("a_seed-1", gold="8")}
    others = block(apart.build(Results(results.summary, other, {}, results.out)))
    assert [row[0] for row in others["rows"]] == ["b"], "the other has no problem of the base"
    older = {name: {**record, "protocol": {}} for name, record in results.evaluations.items()}
    assert "older version" in str(apart.build(Results(results.summary, older, {}, results.out)))


def test_one_run_each_is_compared_with_the_model_that_the_sweep_names(results: Results) -> None:
    named = Results({**results.summary, "against": "b"}, results.evaluations, {}, results.out)
    found = block(apart.build(named))
    assert found["reference"] == "b"
    assert [row[0] for row in found["rows"]] == ["base", "method a"]
    assert found["rows"][0][2].endswith("longer")


def test_models_of_several_seeds_that_were_asked_otherwise_are_left_out_and_named(
    results: Results,
) -> None:
    records = dict(results.evaluations)
    for name in ("c", "d"):
        records |= {f"{name}_seed-{seed}": record(f"a_seed-{seed}") for seed in (1, 2)}
    records["d_seed-1"] = {
        **records["d_seed-1"],
        "protocol": {"max_new_tokens": LIMIT, "temperature": 0.5},
    }
    listed = [
        *MODELS,
        *(Listed(n, f"method {n}", (f"{n}_seed-1", f"{n}_seed-2"), "base") for n in ("c", "d")),
    ]
    found = block(
        apart.build(Results(family_summary(records, listed, {}), records, {}, results.out))
    )
    assert [row[0] for row in found["rows"]] == ["method c"]
    assert found["sentence"].startswith("Of 1 models")
    assert found["sentence"].endswith("Not among them, since they were asked otherwise: method d.")
    few = Results(family_summary(records, [*MODELS, listed[-1]], {}), records, {}, results.out)
    assert apart.build(few) == "No other model of several seeds was asked as method a was."


def test_parts_of_a_model_of_several_seeds_are_the_means_over_these(results: Results) -> None:
    records = {}
    for name, own in results.evaluations.items():
        halves = {
            part: {"accuracy": own["accuracy"], "tokens": own["tokens"] * k}
            for k, part in ((1, "A"), (2, "B"))
        }
        records[name] = {**own, "datasets": halves}
    both = Results(results.summary, records, {}, results.out)
    cells = {row["label"]: row["cells"] for row in block(family.build(both))["datasets"]["rows"]}
    model, ends = results.models[1], results.evaluations
    assert cells["method a"] == [
        f"{model['accuracy']:.1%} / {k * model['tokens']:,.0f}" for k in (1, 2)
    ]
    pair = [ends[f"a_seed-{seed}"]["accuracy_by_difficulty"] for seed in (1, 2)]
    expected = {
        level: pytest.approx(50 * (pair[0][level] + pair[1][level])) for level in ("0", "1")
    }
    assert difficulty._accuracy(both.records(model)) == expected
    together = {
        row["id"]: row["tokens"] for row in difficulty._together(both.records(model))["rows"]
    }
    assert together == {"p0": [10, 33, 5, 30], "p1": [8, 60, 9, 40], "p2": [30, 30, 33, 30]}


def test_further_figures_are_means_over_all_seeds_and_none_over_some(results: Results) -> None:
    voted = {
        name: {**each, "majority": 0.1 * place}
        for place, (name, each) in enumerate(results.evaluations.items())
    }
    found = block(family.build(Results(results.summary, voted, {}, results.out)))
    cells = found["rows"][1]["more"]
    assert found["more"] == [
        "tokens when right", "when wrong", "per right answer", "truncated", "pass@2", "majority",
        "AES",
    ]  # fmt: skip
    own = [results.evaluations[f"a_seed-{seed}"] for seed in (1, 2)]
    for key, name in (
        ("tokens_right", "tokens when right"),
        ("tokens_wrong", "when wrong"),
        ("tokens_per_right_answer", "per right answer"),
    ):
        assert cells[name] == f"{np.mean([record[key] for record in own]):.1f}"
    assert own[0]["tokens_right"] != own[1]["tokens_right"]
    assert cells["pass@2"] == f"{np.mean([record['pass_at_k']['2'] for record in own]):.1%}"
    assert cells["majority"] == "15.0%"
    fewer = {name: each for name, each in results.evaluations.items() if name != "a_seed-2"}
    some = Results(results.summary, fewer, {}, results.out)
    model = some.models[1]
    assert results.measure(model, "accuracy") is not None
    assert some.measure(model, "accuracy") is None
    assert some.record(model) == own[0]
    assert list(block(family.build(some))["rows"][1]["more"]) == ["AES"]
    before = {**model, "runs": ["a_seed-1"]}  # of two seeds, and one run is named
    assert results.records(before) == []


def test_a_measure_that_somebody_registered_for_an_evaluation_alone_is_shown(
    results: Results,
) -> None:
    own = {"mine": {"value": 0.25, "low": None, "high": None}}
    records = {
        n: {**r, "measures": {**r["measures"], **own}} for n, r in results.evaluations.items()
    }
    found = block(family.build(Results(results.summary, records, {}, results.out)))
    assert found["measures"]["rows"][-1] == ["mine", "0.25", "0.25 [0.25, 0.25]", "0.25"]


def test_models_are_told_against_the_base_that_they_begin_with() -> None:
    def model(name: str, base: str, accuracy: float, tokens: float) -> Record:
        return {"name": name, "label": name, "base": base, "accuracy": accuracy, "tokens": tokens}

    small, large = model("base", "base", 0.5, 50.0), model("base-2", "base-2", 0.9, 100.0)
    brief = model("brief", "base-2", 0.9, 40.0)
    own = model("own", "base", 0.6, 45.0)
    assert headline([small, large, own, brief], {}).startswith(
        "With own, the model uses 10% fewer tokens than the base"
    )
    assert headline([small, large, brief], {}).startswith(
        "With brief, the model uses 60% fewer tokens than the base-2"
    )
    assert headline([small, large], {}).startswith("Only starting models")
