"""The report: what it says follows from the figures, all of it escaped, and it stands alone."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from megatron_efr.evaluation.records import summarise
from megatron_efr.report import build_summary, write_report
from megatron_efr.report.sentences import chosen_problems, difficulty_sentences, headline
from megatron_efr.types import Prompt
from tests.groups import graded

pytestmark = pytest.mark.alike


def evaluate(name, accuracy, lengths, seed=0, problems=120, dataset="sums"):
    """Graded groups whose responses to difficulty d have about lengths[d] tokens."""
    rng = np.random.default_rng(seed)
    groups = []
    for index in range(problems):
        level = 2 + index % len(lengths)
        count = max(1, round(lengths[level - 2] * rng.uniform(0.8, 1.2)))
        meta = {"difficulty": level, "dataset": dataset, "question": f"Sum number {index} <b>&"}
        prompt = Prompt(f"p{index}", (1, 2), "text", str(index), meta)
        groups.append(
            graded(
                [rng.random() < accuracy],
                [count],
                text=f"<i>{name}</i> says {index}",
                prompt=prompt,
            )
        )
    return summarise(groups, name)


@pytest.fixture
def family():
    lengths = np.array([20.0, 40, 60, 80, 100, 120, 140])
    alphas = {"alpha-0.4": 0.4, "base": None, "alpha-0": 0.0, "alpha-0.1": 0.1}
    shares = {"base": 1.0, "alpha-0": 0.9, "alpha-0.1": np.linspace(0.5, 0.8, 7), "alpha-0.4": 0.5}
    rates = {"base": 0.6, "alpha-0": 0.9, "alpha-0.1": 0.95, "alpha-0.4": 0.9}
    evaluations = {
        name: evaluate(name, rates[name], shares[name] * lengths, seed=i)
        for i, name in enumerate(alphas)
    }
    metrics = {
        name: [
            {
                "step": s,
                "accuracy": 0.5 + s / 100,
                "tokens_mean": 60.0 - s,
                "reward_mean": 0.5,
                "kl": None if s == 1 else 0.1,
            }
            for s in range(1, 30)
        ]
        for name in alphas
        if name != "base"
    }
    summary = build_summary(
        evaluations, alphas, {"sft": 12.0, "rl": 100.0, "evaluate": 5.0, "total": 117.0}
    )
    return summary, evaluations, metrics


class Tags(HTMLParser):
    """Checks nesting and collects ids, attributes that load something, and the text."""

    VOID = frozenset({"meta", "br", "img", "link", "path", "use"})

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.loads, self.text = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "srcset", "action", "data"):
                self.loads.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_holds_the_figures_and_refers_to_nothing_outside(tmp_path, family):
    summary, evaluations, metrics = family
    # a run without any of the curves is left out of them
    metrics["warm-start"] = [{"step": 1, "loss": 2.0}]
    path = write_report(
        summary, evaluations, metrics, tmp_path / "report", note="A tiny model on a toy task."
    )
    html = path.read_text()
    tags = Tags(html)
    text = " ".join(tags.text)
    assert tags.open == []
    assert len(tags.ids) == len(set(tags.ids))
    assert all(value.startswith("#") for value in tags.loads)
    assert "://" not in html
    assert "default-src 'none'" in html, "and a browser would load nothing from outside"
    assert "@import" not in html
    assert "warm-start" not in text
    assert "A tiny model on a toy task." in text
    for model in summary["models"]:
        low, high = model["accuracy_ci"]
        assert f"{100 * model['accuracy']:.1f}%" in text
        assert f"[{100 * low:.1f}, {100 * high:.1f}]" in text
        assert f"{model['tokens']:.1f}" in text
    pictures = ("curves", "difficulty", "family", "lengths")
    for name in pictures:
        assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(tmp_path / "report" / f"{name}.svg").getroot().tag.endswith("svg")
    kinds = [f"{name}.{kind}" for name in pictures for kind in ("png", "svg")]
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([*kinds, "index.html"])


def test_everything_that_came_from_outside_is_escaped(tmp_path, family):
    summary, evaluations, metrics = family
    evil = '<script>alert("x")</script> $\\frac{1}$'
    for record in (*evaluations.values(), *summary["models"]):
        if record["name"] == "alpha-0":
            record["name"] = evil
    evaluations = {record["name"]: record for record in evaluations.values()}
    metrics[evil] = metrics.pop("alpha-0")
    html = write_report(
        summary,
        evaluations,
        metrics,
        tmp_path,
        title=evil,
        note=evil,
        configs={evil: evil},
        versions={evil: evil},
    ).read_text()
    assert "<script" not in html
    assert "<i>base</i>" not in html
    assert "&lt;i&gt;base&lt;/i&gt; says" in html
    assert Tags(html).open == []


def test_the_same_figures_give_the_same_page(tmp_path, family):
    first = write_report(*family, tmp_path / "a").read_bytes()
    assert write_report(*family, tmp_path / "b").read_bytes() == first


def test_a_single_model_and_an_empty_folder_still_make_a_page(tmp_path, family):
    _, evaluations, metrics = family
    alone = build_summary({"m": {**evaluations["base"], "name": "m"}}, {"m": None}, {})
    html = write_report(alone, {"m": evaluations["base"]}, {}, tmp_path / "one").read_text()
    assert "No training metrics" in html
    trained = write_report(
        {"models": [], "seconds": {}}, {}, {"run": metrics["alpha-0"]}, tmp_path / "run"
    ).read_text()
    assert "training accuracy went from 51.5% to 78.5%" in trained  # steps 1, 2 and 28, 29
    assert "No evaluation on held-out problems" in trained
    empty = write_report({"models": [], "seconds": {}}, {}, {}, tmp_path / "none").read_text()
    assert "Nothing has been measured yet." in empty
    assert not (tmp_path / "none" / "family.png").exists()


def model(name, alpha, accuracy, tokens):
    return {
        "name": name,
        "alpha": alpha,
        "accuracy": accuracy,
        "tokens": tokens,
        "tokens_by_difficulty": {},
    }


def test_the_headline_picks_the_briefest_that_is_no_less_accurate():
    base, good, brief = (
        model("base", None, 0.7, 50.0),
        model("a", 0.1, 0.9, 40.0),
        model("b", 0.4, 0.6, 20.0),
    )
    assert headline([base, good, brief], {}) == (
        "With alpha 0.1, the model uses 20% fewer tokens than the base (40.0 against 50.0 on "
        "average) and is right 90.0% of the time, against 70.0%."
    )
    assert "alpha 0.4" in headline([base, brief], {})
    assert "is less often right: 60.0% of the time, against 70.0%" in headline([base, brief], {})
    assert "10% more tokens" in headline([base, model("c", 0.0, 0.8, 55.0)], {})


def test_the_headline_says_its_interval_its_deviation_or_that_it_is_one_iteration():
    base, good = model("base", None, 0.7, 50.0), model("a", 0.1, 0.9, 40.0)
    known = [
        one | {"accuracy_ci": [one["accuracy"] - 0.05, one["accuracy"] + 0.04]}
        for one in (base, good)
    ]
    assert headline(known, {}).endswith(
        "is right 90.0% (95% interval 85.0% to 94.0%) of the time, against 70.0% (95% interval "
        "65.0% to 74.0%)."
    )
    assert headline(known[:1], {}).startswith(
        "base is right 70.0% (95% interval 65.0% to 74.0%) of the time"
    )
    seeds = [one | {"accuracy_sd": 0.02, "accuracy_by_seed": [1, 2, 3]} for one in (base, good)]
    assert "is right 90.0% (± 2.0% over 3 seeds) of the time" in headline(seeds, {})
    line = {"step": 1, "accuracy": 0.25, "tokens_mean": 31.04}
    assert headline([], {"run": [line]}) == (
        "run: in the one iteration that there is, training accuracy was 25.0% and mean tokens 31.0."
    )
    assert "over 2 iterations" in headline([], {"run": [line, line | {"step": 2}]})


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (np.linspace(0.4, 0.8, 6), "Compute follows difficulty"),
        (np.linspace(0.8, 0.4, 6), "hard problems take fewer tokens than easy ones"),
        (np.full(6, 0.6), "alike many tokens"),
    ],
)
def test_difficulty_is_reported_whichever_way_it_falls(share, expected):
    lengths = np.array([50.0, 100, 150, 200, 250, 300])
    evaluations = {
        "base": evaluate("base", 0.7, lengths, problems=300),
        "short": evaluate("short", 0.7, share * lengths, problems=300, seed=0),
    }
    summary = build_summary(evaluations, {"base": None, "short": 0.1}, {})
    first, sentence = difficulty_sentences(summary["models"], evaluations)
    assert expected in first
    assert "difficulty 2, 3, 4; hard, 5, 6, 7" in first
    easy, hard = (int(value) / 100 for value in re.findall(r"(\d+)% (?:of|on hard)", sentence)[:2])
    weighted = [
        np.average(share[part], weights=lengths[part]) for part in (slice(0, 3), slice(3, 6))
    ]
    assert [easy, hard] == pytest.approx(weighted, abs=0.02)


def test_the_shown_problem_is_the_first_of_median_difficulty_that_the_base_gets_right():
    def record(rights):
        rows = [
            {"id": str(i), "difficulty": str(level), "correct": [right]}
            for i, (level, right) in enumerate(zip([2, 3, 3, 3, 10], rights, strict=True))
        ]
        return {"rows": rows}

    chosen, *more = chosen_problems(
        ["base", "x"], {"base": record([1, 0, 0, 1, 1]), "x": record([0] * 5)}
    )
    assert chosen.rows["base"]["id"] == "3"
    assert "median difficulty (3)" in chosen.rule
    assert [(each.rows["x"]["id"], each.rule.split(" that ")[0]) for each in more] == [
        ("0", "the first problem of the lowest difficulty (2)"),
        ("4", "the first problem of the highest (10)"),
    ]
    [fallback] = chosen_problems(["base"], {"base": record([0, 0, 0, 0, 1])})
    assert fallback.rows["base"]["id"] == "4"
    [none] = chosen_problems(["base"], {"base": record([0] * 5)})
    assert none.rows["base"]["id"] == "0"
    assert chosen_problems(["base"], {}) == []


def test_several_data_sets_are_shown_with_normalised_figures(tmp_path):
    def two(name, first, second):
        parts = [
            evaluate(name, 1.0, [first], problems=10, dataset="A"),
            evaluate(name, 1.0, [second], problems=10, dataset="B"),
        ]
        record = dict(parts[0])
        record["datasets"] = parts[0]["datasets"] | parts[1]["datasets"]
        return record

    evaluations = {"base": two("base", 100, 1000), "short": two("short", 50, 1000)}
    summary = build_summary(evaluations, {"base": None, "short": 0.1}, {})
    html = write_report(summary, evaluations, {}, tmp_path).read_text()
    assert "100.0% / 75.0%" in html  # (0.5 + 1) / 2 of the tokens, with the same draws of length
