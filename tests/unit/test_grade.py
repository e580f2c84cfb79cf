"""`efr grade`: files of responses and a run's rollouts, judged, compared, counted; what is said,
and exit codes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_efr import arguments, grade
from megatron_efr.config import ConfigError
from megatron_efr.run.folder import RunFolder
from megatron_efr.types import Grade, Graded, Group, Prompt
from tests.groups import credited, response

pytestmark = pytest.mark.alike

ROWS = [
    {"gold": "1/2", "response": r"so \boxed{0.5}"},
    {"gold": "7", "response": "none"},
    {"gold": 7, "response": [r"\boxed{7}", r"\boxed{8}", r"\boxed{foo bar ((}"]},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_each_response_is_named_with_its_verdict_answer_and_gold(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grade.main([str(file)])
    out = capsys.readouterr().out.replace(f"{file}", "F")
    assert out.splitlines() == [
        "F:1  math  correct  answer 0.5  gold 1/2",
        "F:2  math  no_answer  no answer  gold 7  (the response has none where it is looked for)",
        "F:3.1  math  correct  answer 7  gold 7",
        "F:3.2  math  wrong  answer 8  gold 7",
        "F:3.3  math  unparsed  answer foo bar ((  gold 7  (the verifier cannot read the answer)",
        "math: 40.0% of 5 correct (correct 2, wrong 1, no_answer 1, unparsed 1)",
    ]


def test_verifiers_that_disagree_are_named(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grade.main([str(file), "--totals", "--verifier", "math", "--verifier", "exact"])
    out = capsys.readouterr().out.replace(f"{file}", "F")
    assert out.splitlines() == [
        "math: 40.0% of 5 correct (correct 2, wrong 1, no_answer 1, unparsed 1)",
        "exact: 20.0% of 5 correct (correct 1, wrong 3, no_answer 1)",
        "1 of 5 are judged differently:",
        "F:1: math correct, exact wrong",
    ]


def test_json_has_the_same(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grade.main([str(file), "--json", "--verifier", "numeric", "--option", "relative=0.5"])
    tree = json.loads(capsys.readouterr().out)
    assert tree["totals"] == {"numeric": {"correct": 3, "no_answer": 1, "unparsed": 1}}
    assert tree["disagreements"] == []
    assert tree["responses"][0] == {
        "where": f"{file}:1",
        "gold": "1/2",
        "recorded": None,
        "verdicts": {"numeric": {"status": "correct", "score": 1.0, "answer": "0.5", "reason": ""}},
    }


def test_the_exit_code_says_that_some_could_not_be_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"target": "(a+)+", "output": "a" * 60 + "!"}) + "\n")
    with pytest.raises(SystemExit) as ended:
        grade.main([str(path), "--verifier", "regex", "--answer", "whole", "--timeout-s", "0.3"])
    assert ended.value.code == grade.EXIT_UNJUDGED == 1
    assert "timeout" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"gold": "1"},
            [],
            "r.jsonl:1: no response: no column response, completion, output, prediction, text; it "
            "has",
        ),
        (
            {"gold": "1", "r": "2"},
            ["--response-key", "s"],
            "r.jsonl:1: no response: no column s; it has gold, r",
        ),
        ({"response": "1"}, [], "r.jsonl:1: no gold: no column gold, answer, final_answer, target"),
        ({"gold": None, "response": "1"}, [], "r.jsonl:1: the gold is a NoneType, not text"),
        ({"gold": "1", "response": [1]}, [], "r.jsonl:1: a response is a int, not text"),
        ({"gold": "1", "response": "1"}, ["--answer", "marker"], "answer: marker needs `marker`"),
        (
            {"gold": "1", "response": r"\boxed{1}"},
            ["--verifier", "numerics"],
            "no verifier 'numerics'; built in: math",
        ),
        (
            {"gold": "1", "response": "1"},
            ["--config", "none.yaml"],
            "none.yaml: no such configuration",
        ),
    ],
)
def test_what_is_wrong_is_said_with_exit_code_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    row: dict[str, Any],
    options: list[str],
    message: str,
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit) as ended:
        arguments.run(grade.main, [str(path), *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def rollouts(place: Path, **grading: Any) -> Path:
    """A run's folder with one iteration's rollouts, judged by math as they were made."""
    folder = RunFolder(place / "run")
    texts = [
        (r"\boxed{1/2} Answer: C) half", "stop"),
        (r"\boxed{0.5} Answer: D", "stop"),
        (r"\boxed{0.5}", "length"),
    ]
    responses = tuple(replace(response(1, finish), text=text) for text, finish in texts)
    prompt = Prompt("a/1", (1,), "q", "C", {"dataset": "a"})
    grades = (Grade("wrong"), Grade("wrong"), Grade("truncated"))
    folder.write_rollouts(3, [credited(Graded(Group(prompt, responses), grades), [0.0] * 3)])
    tree = {
        "name": "run",
        "model": {"path": "m"},
        "data": {"datasets": [{"path": "a.jsonl", "grading": grading or None}]},
        "optimizer": {"lr": 1e-3},
        "method": {"name": "efr"},
    }
    folder.config.write_text(json.dumps(tree))
    return folder.rollouts_path(3)


def test_a_runs_rollouts_are_judged_as_the_run_says_and_what_was_recorded_is_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rollouts(tmp_path, verifier="choice", answer="marker", marker="Answer:")
    grade.main([str(path)])
    out = capsys.readouterr().out.replace(f"{path}", "F")
    assert out.splitlines() == [
        "F:1.1  choice  correct  answer C) half  gold C",
        "F:1.2  choice  wrong  answer D  gold C",
        "F:1.3  choice  truncated  no answer  gold C  (cut off before its end, hence wrong)",
        "choice: 33.3% of 3 correct (correct 1, wrong 1, truncated 1)",
        "1 of 3 are judged differently:",
        "F:1.1: recorded wrong, choice correct",
    ]
    grade.main([str(path), "--totals", "--verifier", "exact"])
    assert capsys.readouterr().out.splitlines() == [
        "exact: 0.0% of 3 correct (wrong 2, truncated 1)"
    ]


def test_damaged_rollouts_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = rollouts(tmp_path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(SystemExit):
        arguments.run(grade.main, [str(path)])
    assert f"{path}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--workers", "0"], "argument --workers: 0: at least 1"),
        (["--timeout-s", "-1"], "argument --timeout-s: -1: at least 0.001"),
    ],
)
def test_limits_that_are_none_are_refused_by_flag(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        grade.main(["responses.jsonl", *flags])
    assert said in capsys.readouterr().err


def test_an_option_that_is_no_yaml_is_refused_by_its_words() -> None:
    with pytest.raises(ConfigError, match=r"--option search=\[: '\[' is no value as YAML has them"):
        grade.main(["responses.jsonl", "--option", "search=["])
