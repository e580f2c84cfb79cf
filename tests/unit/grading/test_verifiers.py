"""Verifiers beside math: built-in ones, plug-ins of a real package in killable processes, and their
configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from megatron_efr.config import ConfigError, GradingConfig, JudgingConfig
from megatron_efr.config.file import validate
from megatron_efr.grading import GoldError, Grade, Grader, GraderError
from megatron_efr.grading.gold_checks import check_for
from megatron_efr.grading.groups import grade_groups
from megatron_efr.grading.judging import Judging, Judgings
from megatron_efr.grading.verdict import Question, Verifier
from megatron_efr.grading.verifiers import ask
from megatron_efr.rollout.group_json import decode_credited, encode_credited
from megatron_efr.types import Branch, Graded, Group, Prompt, Response
from tests.groups import credited, response

pytestmark = pytest.mark.alike

PACKAGE = """
import os, subprocess, sys, time

print("imported: no part of any program's output")

def even(answer, gold):
    return int(answer) % 2 == 0

def close(answer, gold, scale=10.0):
    return max(0.0, 1.0 - abs(float(answer) - float(gold)) / scale)

def _check(gold):
    return None if gold.isdigit() else "a gold of digits is expected"

close.check_gold = _check
close.equal = lambda answer, other: float(answer) == float(other)

class Among:
    def __init__(self, words):
        self.words = set(words)
    def __call__(self, answer, gold):
        return answer in self.words
    def check_gold(self, gold):
        return None if gold in self.words else f"{gold} is none of the words"

def hostile(answer, gold):
    if answer == "raise":
        raise RuntimeError("out of luck")
    if answer == "exit":
        sys.exit(3)
    if answer == "die":
        os._exit(7)
    if answer == "loop":
        while True:
            pass
    if answer == "sleep":
        time.sleep(3600)
    if answer == "memory":
        return len("x" * (8 << 30)) > 0
    if answer == "child":
        subprocess.Popen(["sleep", "3601"])
        time.sleep(3600)
    return {"none": None, "two": 2, "nan": float("nan"), "text": "yes", "half": 0.5, "one": 1}.get(answer, True)

not_callable = 5
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A third party's package as pip installs it, its entry points in its metadata, on the path of
    new processes.
    """
    tmp_path = tmp_path_factory.mktemp("site")
    (tmp_path / "third_party.py").write_text(PACKAGE)
    (tmp_path / "broken_party.py").write_text("import a_module_that_is_not_there\n")
    metadata = tmp_path / "third_party-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[megatron_efr.verifiers]\nclose = third_party:close\nbroken = broken_party:verify\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        yield tmp_path


@pytest.fixture(scope="module")
def grader(package: Path) -> Iterator[Grader]:
    with Grader(
        timeout_s=0.5, memory_bytes=400 << 20, stall_s=1.0, verifiers=[Verifier("exact")]
    ) as pool:
        yield pool


def verdicts(verifier: Verifier, *pairs: tuple[str, str]) -> list[str]:
    return [ask(Question(verifier, gold, answer)).status for answer, gold in pairs]


# -- plug-ins
# --------------------------------------------------------------------------------------------------


def test_a_registered_plugin_is_found_by_its_name(grader: Grader) -> None:
    close = Verifier.of("close", {"scale": 4.0}, threshold=0.75)
    assert grader.compare(["10", "11", "12", None], ["10"] * 4, close) == [
        Grade("correct", 1.0),
        Grade("correct", 0.75),
        Grade("wrong", 0.5),
        Grade("no_answer"),
    ]


def test_a_plugin_is_found_as_module_and_function_and_a_class_is_made_once(grader: Grader) -> None:
    assert [
        g.status for g in grader.compare(["4", "5"], ["", ""], Verifier("third_party:even"))
    ] == [
        "correct",
        "wrong",
    ]
    among = Verifier.of("third_party:Among", {"words": ["sun", "moon"]})
    assert [g.status for g in grader.compare(["sun", "sea"], ["moon", "moon"], among)] == [
        "correct",
        "wrong",
    ]


HOSTILE = {
    "raise": ("crash", "RuntimeError: out of luck"),
    "exit": ("crash", "exit status 3"),
    "die": ("crash", "exit status 7"),
    "loop": ("timeout", "more than 0.5 s of CPU"),
    "memory": ("memory", ""),
    "none": ("crash", "returned None"),
    "two": ("crash", "returned 2"),
    "nan": ("crash", "returned nan"),
    "text": ("crash", "returned 'yes'"),
}


@pytest.mark.heavy
def test_whatever_a_plugin_does_costs_its_own_answer_alone(grader: Grader) -> None:
    asked = [answer for name in HOSTILE for answer in (f"good {name}", name)]
    grades = grader.compare(asked, [""] * len(asked), Verifier("third_party:hostile"))
    for answer, grade in zip(asked, grades, strict=True):
        status, reason = HOSTILE.get(answer, ("correct", ""))
        assert (answer, grade.status) == (answer, status)
        assert reason in grade.reason


@pytest.mark.heavy
def test_a_plugin_that_sleeps_is_ended_with_what_it_started(grader: Grader) -> None:
    grades = grader.compare(["child", "sleep", "fine"], [""] * 3, Verifier("third_party:hostile"))
    assert [grade.status for grade in grades] == ["crash", "crash", "correct"]
    assert "no CPU used for 1 s" in grades[0].reason
    commands = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert ["sleep", "3601"] not in commands


def test_a_score_is_kept_and_true_numbers_are_scores(grader: Grader) -> None:
    grades = grader.compare(["half", "one"], ["", ""], Verifier("third_party:hostile"))
    assert [(grade.status, grade.score) for grade in grades] == [("wrong", 0.5), ("correct", 1.0)]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "broken",
            {},
            "verifier 'broken' cannot be imported: ModuleNotFoundError: No module named "
            "'a_module_that",
        ),
        (
            "no_party:verify",
            {},
            "verifier 'no_party:verify' cannot be imported: ModuleNotFoundError",
        ),
        (
            "third_party:missing",
            {},
            "verifier 'third_party:missing' cannot be imported: AttributeError",
        ),
        (
            "closed",
            {},
            "no verifier 'closed'; built in: math, exact, choice, numeric, regex; registered under",
        ),
        ("third_party:even", {"odd": 1}, r"does not take options \{'odd': 1\}: TypeError"),
        ("third_party:not_callable", {}, "a int, which cannot be called"),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_refused_at_the_start(
    package: Path, name: str, options: dict[str, Any], message: str
) -> None:
    judging = Judging.of(JudgingConfig(verifier=name, options=options))
    with pytest.raises(GraderError, match=message):
        check_for(judging, GradingConfig(), [("a.jsonl:1", "5")])


# -- golds, by the data set's own verifier
# -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verifier", "options", "golds", "lines"),
    [
        ("choice", {}, ["C", "5", "(d)"], ["a.jsonl:2: '5': no option letter"]),
        ("numeric", {}, ["5", "five", "1e3"], ["a.jsonl:2: 'five': no number"]),
        ("regex", {}, ["a+", "(", "b"], ["a.jsonl:2: '(': no regular expression"]),
        ("exact", {}, ["a", " "], ["a.jsonl:2: ' ': empty"]),
        ("close", {}, ["5", "x"], ["a.jsonl:2: 'x': a gold of digits is expected"]),
        (
            "third_party:Among",
            {"words": ["sun"]},
            ["sun", "sea"],
            ["a.jsonl:2: 'sea': sea is none of the words"],
        ),
        ("math", {}, ["5", "(("], ["a.jsonl:2: '(('"]),
    ],
)
def test_golds_are_checked_by_the_verifier(
    package: Path, verifier: str, options: dict[str, Any], golds: list[str], lines: list[str]
) -> None:
    judging = Judging.of(JudgingConfig(verifier=verifier, options=options))
    rows = [(f"a.jsonl:{number}", gold) for number, gold in enumerate(golds, start=1)]
    with pytest.raises(GoldError) as error:
        check_for(judging, GradingConfig(), rows)
    [first, *rest] = str(error.value).splitlines()
    assert first.startswith(f"1 of {len(golds)} gold answers")
    assert [line[: len(wanted)] for line, wanted in zip(rest, lines, strict=True)] == lines
    check_for(judging, GradingConfig(), rows[:1])


# -- groups and scores
# -------------------------------------------------------------------------------------------------


def group(gold: str, *texts: str, dataset: str = "a", cut: int = 0) -> Group:
    responses = [response(1, text=text) for text in texts]
    responses += [response(1, "length", text=texts[0]) for _ in range(cut)]
    return Group(Prompt("a/1", (1,), "", gold, {"dataset": dataset}), tuple(responses))


def statuses(graded: Graded) -> list[str]:
    return [grade.status for grade in graded.grades]


def test_scores_are_the_mean_by_weight_and_the_first_verifier_alone_says_what_is_correct(
    grader: Grader,
) -> None:
    config = JudgingConfig.model_validate(
        {
            "verifier": "numeric",
            "weight": 3.0,
            "parts": [
                {"verifier": "close", "weight": 1.0, "options": {"scale": 4.0}},
                {
                    "verifier": "regex",
                    "weight": 2.0,
                    "answer": "whole",
                    "options": {"search": True},
                },
            ],
        }
    )
    asked = group("10", r"10: \boxed{10}", r"\boxed{11}", "none, not 10", cut=1)
    (graded,) = grade_groups(grader, [asked], Judgings(Judging.of(config)))
    assert statuses(graded) == ["correct", "wrong", "no_answer", "truncated"]
    assert graded.correct.tolist() == [True, False, False, False]
    # by hand: (3 x numeric + 1 x close + 2 x regex) / 6
    np.testing.assert_allclose(
        graded.scores, [1.0, (0 + 0.75 + 0) / 6, (0 + 0 + 2) / 6, 0.0], rtol=1e-15
    )
    read = decode_credited(encode_credited(credited(graded, np.zeros(4))))
    assert read.graded.scores.tolist() == graded.scores.tolist()


def test_the_answers_of_branches_are_judged_beside_their_responses(grader: Grader) -> None:
    """By their own text, and also if they were cut off; a response that was cut off keeps its
    branches.
    """
    asked = group("10", r"\boxed{10}", r"\boxed{11}", cut=1)
    texts = [[], [r"\boxed{11}", r"\boxed{10}"], [r"\boxed{10}"]]
    responses = []
    for each, own in zip(asked.responses, texts, strict=True):
        answers = (Response((1,), np.zeros(1, np.float32), "length", text=text) for text in own)
        responses.append(
            replace(each, branches=tuple(Branch("exit", 1, (answer,)) for answer in answers))
        )
    asked = replace(asked, responses=tuple(responses))
    (plain,), (graded,) = (
        grade_groups(grader, [asked]),
        grade_groups(grader, [asked], branches=True),
    )
    assert statuses(plain) == statuses(graded) == ["correct", "wrong", "truncated"]
    assert plain.branches == ()
    assert [[grade.correct for grade in each] for each in graded.branches] == [
        [],
        [False, True],
        [True],
    ]


def test_each_data_set_is_judged_its_own_way() -> None:
    own = JudgingConfig(verifier="choice", answer="marker", marker="Answer:")
    judgings = Judgings.of(GradingConfig(), [("a", None), ("b", own)])
    text = r"\boxed{1/2}" + "\nAnswer: C) half"
    groups = [
        group("0.5", text, dataset="a"),
        group("C", text, dataset="b"),
        group("D", text, dataset="b"),
    ]
    with Grader.of(GradingConfig(), judgings.verifiers) as pool:
        graded = grade_groups(pool, groups, judgings)
    assert [statuses(each) for each in graded] == [["correct"], ["correct"], ["wrong"]]
    with pytest.raises(ConfigError, match="two data sets are called b"):
        Judgings.of(GradingConfig(), [("b", None), ("b", own)])


# -- configuration
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"answer": "marker"}, "c.yaml: grading: answer: marker needs `marker`"),
        (
            {"marker": "Answer:"},
            "c.yaml: grading: marker: 'Answer:' is used only with answer: marker",
        ),
        ({"answer": "last"}, "c.yaml: grading.answer: Input should be 'last_box'"),
        (
            {"verifier": "numeric", "options": {"tolerance": 1}},
            "options.tolerance: Extra inputs .* numeric: relative, abs",
        ),
        (
            {"verifier": "numeric", "options": {"relative": "x"}},
            "options.relative: Input should be a valid number",
        ),
        ({"options": {"x": 1}}, "options of math: none"),
        ({"weight": 0}, "grading: weight: 0 leaves no verifier"),
        ({"threshold": 2}, "grading.threshold: Input should be less than or equal to 1"),
        ({"parts": [{"verifier": "exact"}]}, "grading.parts.0.weight: required"),
        ({"verifer": "math"}, "grading.verifer: unknown key; did you mean verifier"),
    ],
)
def test_what_cannot_be_configured_is_said(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(GradingConfig, tree, "c.yaml", prefix="grading")


def test_by_default_math_reads_the_last_box() -> None:
    assert Judging.of(GradingConfig()) == Judging()
    assert Judging().main.extractor(r"\boxed{1} \boxed{2}", "") == "2"
    assert SimpleNamespace(**GradingConfig().model_dump()).answer == "last_box"
