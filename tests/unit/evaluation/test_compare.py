"""Two evaluations compared: intervals and tests against loops, enumeration and scipy; unlike
protocols; the program.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from megatron_efr import cli
from megatron_efr.errors import UserError
from megatron_efr.evaluation import statistics
from megatron_efr.evaluation.comparison import Paired, compare, differing, mcnemar, paired
from megatron_efr.evaluation.figures import measured
from megatron_efr.evaluation.measures import named
from megatron_efr.evaluation.records import Record, samples_of, summarise
from megatron_efr.evaluation.relative import RELATIVE
from megatron_efr.evaluation.samples import Samples
from megatron_efr.types import Graded, Prompt
from tests.groups import graded

pytestmark = pytest.mark.alike
PROTOCOL = {
    "max_new_tokens": 64,
    "temperature": 0.6,
    "script": {"name": "plain"},
    "samples": {"A": 2, "B": 2},
}


def groups(
    seed: int, problems: int = 40, rate: float = 0.6, longest: int = 60, samples: int = 2
) -> list[Graded]:
    rng = np.random.default_rng(seed)
    return [
        graded(
            rng.random(samples) < np.clip(rate + rng.normal(0, 0.2), 0, 1),
            rng.integers(10, longest, samples).tolist(),
            prompt=Prompt(
                f"{'AB'[i % 2]}/{i}",
                (1,) * 9,
                f"Q{i}",
                str(i),
                {"dataset": "AB"[i % 2], "difficulty": i % 3},
            ),
        )
        for i in range(problems)
    ]


def record(of: list[Graded], **changed: Any) -> Record:
    answers = [[0 if grade.correct else i for i, grade in enumerate(each.grades, 1)] for each in of]
    return summarise(of, "m", answers=answers, protocol=PROTOCOL | changed)


@pytest.fixture(scope="module")
def base() -> Record:
    return record(groups(0))


@pytest.fixture(scope="module")
def brief() -> Record:
    return record(groups(1, rate=0.75, longest=30))


def by_name(rows: list[Paired]) -> dict[str, Paired]:
    return {row.name: row for row in rows}


def test_a_difference_is_that_of_the_figures_and_its_interval_a_loops_over_both_together(
    base: Record, brief: Record
) -> None:
    found = by_name(compare(base, brief).figures)
    for name, row in found.items():
        one, other = (measured(samples_of(each), [named(name)])[name] for each in (base, brief))
        assert (row.one, row.other) == (one, other)
        if one.value is not None and other.value is not None:
            assert row.difference.value == pytest.approx(other.value - one.value, abs=1e-12)
    rng, draws = np.random.default_rng(4), []
    each_ones = [[np.mean(row["tokens"]) for row in tree["rows"]] for tree in (base, brief)]
    for _ in range(3000):
        chosen = rng.integers(0, 40, 40).tolist()
        one, other = (sum(means[i] for i in chosen) / 40 for means in each_ones)
        draws.append(other - one)
    assert found["tokens"].difference[1:] == pytest.approx(
        np.quantile(draws, [0.025, 0.975]), abs=0.5
    )
    assert found["tokens"].p == pytest.approx(1 / 10_001)
    assert {row.test for row in found.values() if row.p is not None} == {"sign-flip"}


def test_pairing_takes_out_what_is_hard_for_both() -> None:
    first = groups(3, problems=60)
    longer = [
        graded(g.correct, (g.group.lengths + 2 + i % 2).tolist(), prompt=g.group.prompt)
        for i, g in enumerate(first)
    ]
    (row,) = paired(*(samples_of(record(each)) for each in (first, longer)), [named("tokens")])
    assert row.difference.value == pytest.approx(2.5)
    low, high = row.difference[1:]
    assert low is not None
    assert high is not None
    assert 2.3 < low < 2.5 < high < 2.7, "though tokens themselves are known to some 3"


@pytest.mark.parametrize(
    "name", ["accuracy", "tokens", "pass@2", "tokens_right", "tokens_per_right_answer"]
)
def test_the_sign_flip_test_is_that_of_all_swaps(name: str) -> None:
    of = [
        record(groups(seed, problems=9, rate=rate))["rows"] for seed, rate in ((5, 0.7), (6, 0.6))
    ]
    measure = named(name)
    (row,) = paired(*map(Samples.of, of), [measure])

    def value(rows: Sequence[Any]) -> float:
        terms = measure.terms(Samples.of(rows))
        assert terms is not None
        return float(measure.value(terms.sum(axis=0)))

    differences = []
    for swaps in itertools.product([0, 1], repeat=9):
        pairs = [
            pair[::-1] if swap else pair
            for pair, swap in zip(zip(*of, strict=True), swaps, strict=True)
        ]
        one, other = zip(*pairs, strict=True)
        differences.append(abs(value(other) - value(one)))
    assert differences[0] == pytest.approx(abs(row.difference.value or 0.0))
    assert row.p == pytest.approx(
        np.mean(np.array(differences) >= differences[0] - 1e-12), abs=0.02
    )


def test_a_difference_of_rounding_alone_is_none() -> None:
    shares = np.random.default_rng(8).integers(0, 4, 9)
    of = [shares.copy(), shares.copy()]
    # the sums are of the same numbers, in another order
    of[0][[2, 7]], of[1][[2, 7]] = [1, 2], [2, 1]
    one, other = (
        samples_of(record([graded([i < n for i in range(3)], [9] * 3) for n in own.tolist()]))
        for own in of
    )
    for measure in ("accuracy", "accuracy_area", "tokens_per_right_answer"):
        (row,) = paired(one, other, [named(measure)])
        assert (row.difference.value, row.p) == (0.0, 1.0), measure


def test_problems_that_count_for_one_alone_are_not_in_the_difference() -> None:
    def samples(sizes: Sequence[int], right: int) -> Samples:
        made = [graded([i < right for i in range(n)], [9] * n) for n in sizes]
        return samples_of(record(made))

    one, other = samples([4, 4, 1, 1], 1), samples([4, 4, 4, 2], 2)
    (row,) = paired(one, other, [named("pass@2")])
    assert (row.one.value, row.other.value) == pytest.approx((1 / 2, (3 * 5 / 6 + 1) / 4))
    assert row.difference == pytest.approx((1 / 3, 1 / 3, 1 / 3)), (
        "5 / 6 less 1 / 2, of the first two"
    )


def test_a_cost_that_a_record_says_nothing_of_is_refused(base: Record, brief: Record) -> None:
    old = base | {
        "rows": [{k: v for k, v in row.items() if k != "prompt_tokens"} for row in base["rows"]]
    }
    with pytest.raises(
        UserError, match="measure cost_of_pass: one of the two records does not say what it needs"
    ):
        compare(old, brief, prices=(1.0, 4.0))
    assert by_name(compare(old, brief, prices=(0.0, 4.0)).figures)["cost_of_pass"].unit == "money"


def test_one_sample_of_each_problem_is_mcnemars_exact_test() -> None:
    for one, other in [(0, 0), (3, 9), (12, 1), (40, 40), (0, 6)]:
        known = scipy.stats.binomtest(one, one + other).pvalue if one + other else 1.0
        assert mcnemar(one, other) == pytest.approx(known)
    of = [groups(seed, samples=1, problems=200, rate=rate) for seed, rate in ((7, 0.5), (8, 0.7))]
    a, b = (record(each) for each in of)
    row = by_name(compare(a, b).figures)["accuracy"]
    right = [np.array([each.correct[0] for each in part]) for part in of]
    only = [int((x & ~y).sum()) for x, y in (right, right[::-1])]
    assert (row.test, row.p) == (
        "McNemar",
        pytest.approx(scipy.stats.binomtest(only[0], sum(only)).pvalue),
    )


def test_a_model_does_not_differ_from_itself_and_the_other_way_round_the_signs_turn(
    base: Record, brief: Record
) -> None:
    for row in compare(base, base).figures:
        assert row.difference in ((0.0, 0.0, 0.0), (None, None, None)), row.name
        assert row.p in (1.0, None)
    there, back = (
        by_name(paired(*map(samples_of, pair), [named("tokens")]))
        for pair in ((base, brief), (brief, base))
    )
    low, high = there["tokens"].difference[1:]
    assert back["tokens"].difference[1:] == pytest.approx((-(high or 0), -(low or 0)))
    assert compare(base, brief, seed=1) == compare(base, brief, seed=1)


def test_figures_against_the_base_are_those_of_the_plain_formulas(
    base: Record, brief: Record
) -> None:
    found = compare(base, brief).relative
    saved, won = 1 - brief["tokens"] / base["tokens"], brief["accuracy"] / base["accuracy"] - 1
    assert won > 0
    assert found["aes"].value == pytest.approx(saved + 3 * won)
    plain = statistics.normalised(brief["datasets"], base["datasets"])
    assert found["accuracy_normalised"].value == pytest.approx(plain["accuracy"])
    assert found["tokens_normalised"].value == pytest.approx(plain["tokens"])
    assert all(
        f.low is not None and f.high is not None and f.low <= (f.value or 0) <= f.high
        for f in found.values()
    )
    assert compare(base, base).relative["aes"] == (0.0, 0.0, 0.0)
    never = record(groups(0, rate=-9.0))
    assert compare(never, brief).relative["aes"].value is None
    assert compare(brief, never).relative["aes"].value == pytest.approx(
        1 - never["tokens"] / brief["tokens"] - 5
    )
    assert all(measure.about for measure in RELATIVE.values())


def test_what_was_forgotten_is_what_turned_from_right_to_wrong() -> None:
    """Of eight problems of A two are forgotten and one is learnt; of B, of three samples each, two
    right ones count; of thirty of C six are forgotten and none is learnt.
    """

    def one(dataset: str, number: int, right: Sequence[int]) -> Graded:
        meta = {"dataset": dataset, "difficulty": None}
        return graded(
            right,
            [9] * len(right),
            prompt=Prompt(f"{dataset}/{number}", (1,), f"Q{number}", "1", meta),
        )

    verdicts = {
        "A": ([[1], [1], [1], [0], [0], [1], [1], [0]], [[0], [0], [1], [1], [0], [1], [1], [0]]),
        "B": ([[1, 1, 0], [1, 0, 0], [1, 1, 1]], [[1, 0, 0], [0, 0, 1], [0, 1, 1]]),
        "C": ([[1]] * 30, [[0]] * 6 + [[1]] * 24),
    }
    before, after = (
        record(
            [
                one(name, i, right)
                for name, both in verdicts.items()
                for i, right in enumerate(both[side])
            ]
        )
        for side in (0, 1)
    )
    found = compare(before, after).turned
    assert list(found) == ["A", "B", "C"]
    a, b, c = found.values()
    assert (a.problems, a.forgotten.value, a.learnt.value, a.net.value) == (8, 2 / 8, 1 / 8, -1 / 8)
    assert (b.problems, b.forgotten.value, b.learnt.value, b.net.value) == (3, 1 / 3, 0.0, -1 / 3)
    assert (c.problems, c.forgotten.value, c.learnt.value, c.net.value) == (30, 0.2, 0.0, -0.2)
    assert (a.p, b.p, c.p) == (1.0, 1.0, 2 / 2**6), "2 of 3, 1 of 1 and 6 of 6 of a fair coin"
    back = compare(after, before).turned
    assert (back["A"].forgotten, back["A"].learnt, back["C"].p) == (a.learnt, a.forgotten, c.p)
    same = compare(before, before).turned["A"]
    assert (same.forgotten, same.net, same.p) == (same.learnt, (0.0, 0.0, 0.0), 1.0)

    for name, of in found.items():
        was, is_now = ([np.mean(v) > 0.5 for v in side] for side in verdicts[name])
        net = np.subtract(is_now, was, dtype=float)
        assert of.net[1:] == statistics.interval(net)
        for figure, sign in ((of.forgotten, -1), (of.learnt, 1)):
            turned = scipy.stats.binomtest(int((net == sign).sum()), len(net))
            wilson = turned.proportion_ci(method="wilson")
            assert figure[1:] == pytest.approx((wilson.low, wilson.high), abs=1e-9)


def test_parts_are_compared_each_on_its_own(base: Record, brief: Record) -> None:
    found = compare(base, brief)
    assert list(found.datasets) == ["A", "B"]
    assert list(found.difficulties) == ["0", "1", "2"]
    for part, rows in found.datasets.items():
        row = by_name(rows)["tokens"]
        assert (row.one.value, row.other.value) == (
            base["datasets"][part]["tokens"],
            brief["datasets"][part]["tokens"],
        )


def test_unlike_protocols_are_refused_with_the_keys_that_differ_or_compared_up_to_the_lower_limit(
    base: Record, brief: Record
) -> None:
    other = record(
        groups(1),
        temperature=1.0,
        script={"name": "forks", "at": [4]},
        max_new_tokens=32,
        top_p=0.95,
    )
    with pytest.raises(UserError) as refused:
        compare(base, other)
    assert str(refused.value) == (
        "the two were not asked or judged alike:\n"
        "  max_new_tokens: 64, and 32\n"
        "  temperature: 0.6, and 1.0\n"
        "  script.name: plain, and forks\n"
        "  script.at: not there, and [4]\n"
        "  top_p: not there, and 0.95\n"
        "to compare them all the same, give --unlike"
    )
    found = compare(base, other, unlike=True)
    assert len(found.unlike) == 5
    assert {row.name for row in found.figures if row.name.startswith("accuracy_within")} == {
        f"accuracy_within@{budget}" for budget in (2, 4, 8, 16)
    }
    assert differing(base, brief) == []
    old = {key: value for key, value in base.items() if key not in ("protocol", "schema")}
    with pytest.raises(
        UserError, match="protocol: a record that says none was made by an older version"
    ):
        compare(old, brief)


def test_only_the_same_problems_are_compared(base: Record) -> None:
    few = record(groups(1)[5:25][::-1])
    found = compare(base, few)
    assert found.problems == 20
    tokens = by_name(found.figures)["tokens"]
    assert tokens.other.value == pytest.approx(few["tokens"])
    assert tokens.one.value == pytest.approx(
        np.mean([np.mean(row["tokens"]) for row in base["rows"][5:25]])
    )
    others = [row | {"id": f"x{row['id']}"} for row in base["rows"]]
    with pytest.raises(UserError, match="no problem in common"):
        compare(base, base | {"rows": others})
    with pytest.raises(UserError, match=r"problem A/0 is not the same in both: 'Q0', 'Q\?'"):
        compare(base, base | {"rows": [row | {"question": "Q?"} for row in base["rows"]]})


def test_the_program_prints_a_table_or_json_and_takes_a_run_for_its_one_evaluation(
    base: Record, brief: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for name, tree in (("base", base), ("brief", brief)):
        paths.append(tmp_path / name / "eval/model.json")
        paths[-1].parent.mkdir(parents=True)
        paths[-1].write_text(json.dumps(tree))
    cli._dispatch(["compare", str(paths[0]), str(tmp_path / "brief")])
    lines = capsys.readouterr().out.splitlines()
    low, high = (f"{100 * end:.1f}" for end in base["accuracy_ci"])
    assert lines[1].startswith("accuracy  ".ljust(10))
    assert f"{100 * base['accuracy']:.1f}% [{low}, {high}]" in lines[1]
    names = [line.split("  ")[0] for line in lines]
    assert set(base["measures"]) <= set(names)
    assert {"tokens, A", "tokens, difficulty 2", "aes"} <= set(names)
    assert lines[-3].startswith("40 problems. In brackets: 95% intervals")
    table = names.index("data set")
    assert names[table + 1 : table + 4] == ["A", "B", ""]
    forgotten = compare(base, brief).turned["A"].forgotten
    assert f"{100 * (forgotten.value or 0):.1f}% [" in lines[table + 1]
    cli._dispatch(
        ["compare", *map(str, paths), "--json", "--measures", "tokens,pass@2", "--prices", "1,4"]
    )
    tree = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in tree["figures"]] == ["tokens", "pass@2", "cost_of_pass"]
    assert tree["figures"][0]["one"]["value"] == base["tokens"]
    assert tree["relative"]["aes"]["value"] is not None
    assert tree["turned"]["B"]["net"]["value"] == pytest.approx(
        compare(base, brief).turned["B"].net.value
    )
    (paths[0].parent / "other.json").write_text(paths[0].read_text())
    for given, said in [
        (
            [str(tmp_path / "base"), str(paths[1])],
            r"several evaluations: model.json, other.json; name the file of one",
        ),
        ([str(tmp_path), str(paths[1])], "has no evaluation"),
        ([str(tmp_path / "x.json"), str(paths[1])], "x.json: cannot be read: No such file"),
        ([*map(str, paths), "--measures", "tokenz"], "did you mean tokens"),
        (
            [*map(str, paths), "--measures", "tokens,anytime"],
            "measure anytime: one of the two records does not say",
        ),
        ([*map(str, paths), "--prices", "1"], "--prices '1': not enough values"),
        ([*map(str, paths), "--prices", "1,-2"], "a price is negative"),
        ([*map(str, paths), "--prices", "nan,1"], "'nan,1': a price is negative, or no number"),
        (
            [*map(str, paths), "--measures", "pass@0"],
            "measure pass@0: one of the two records does not say",
        ),
    ]:
        with pytest.raises(UserError, match=said):
            cli._dispatch(["compare", *given])
