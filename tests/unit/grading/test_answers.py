"""Equal answers: pairs of gold and answer that public graders judge wrongly, and others of their
kinds.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_efr.config import DatasetConfig
from megatron_efr.data.datasets import load_problems
from megatron_efr.grading.boxed import answers, boxes
from megatron_efr.grading.compare import count_parts
from megatron_efr.grading.extract import Extractor, Place
from megatron_efr.grading.worker import judge
from tests.respellings import RESPELLINGS, respellings

pytestmark = pytest.mark.alike

DATA = Path(__file__).parents[2] / "data"
REPORTED = [
    json.loads(line)
    for line in (DATA / "grading_cases.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.mark.parametrize(
    "case", REPORTED, ids=lambda case: f"{case['kind']}: {case['gold']} ? {case['box']}"
)
def test_reported_pairs(case: dict[str, str | bool]) -> None:
    assert (judge(str(case["gold"]), str(case["box"])) == "correct") == case["correct"]


OWN = [
    json.loads(line)
    for line in (DATA / "grading_pairs.jsonl").read_text(encoding="utf-8").splitlines()
]


def test_further_pairs_of_the_same_kinds() -> None:
    """Right and wrong ones, among them forms that look alike: brackets, names, digits, letters in
    another order.
    """
    misjudged = [
        case for case in OWN if (judge(case["gold"], case["box"]) == "correct") != case["correct"]
    ]
    assert misjudged == []
    assert len(OWN) > 400


AGAIN = """
import json, sys
from megatron_efr.grading.worker import judge
pairs = json.load(sys.stdin)
print(json.dumps([judge(*pair) for pair in pairs]))
"""


def test_a_verdict_depends_on_nothing_but_its_pair() -> None:
    """The same twice, in another order, after others, and in processes that hash text
    differently.
    """
    pairs = [(case["gold"], case["box"]) for case in (*REPORTED, *OWN[::3])]

    def judged(seed: str, order: list[tuple[str, str]]) -> list[str]:
        command, environment = [sys.executable, "-c", AGAIN], os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(
            command, input=json.dumps(order), env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    forth, back = judged("1", pairs), judged("2", [*pairs[::-1], *pairs[-9:]])
    assert back[: len(pairs)][::-1] == forth
    assert back[len(pairs) :] == forth[-9:]


PUBLIC = [
    json.loads(line)
    for line in (DATA / "math_verify_pairs.jsonl").read_text(encoding="utf-8").splitlines()
]
# line of the file: why the answer is judged otherwise than math-verify's own test wants
DISAGREED = {
    8: "a number inside a sentence in French, before a dollar sign",
    32: "dollars around three lines are read; math-verify's test wants them not to be",
    33: "so are \\( and \\) around three lines",
    36: "an escaped dollar in the middle of a formula",
    61: "the gold is a worked solution with two boxes apart",
    62: "a response that goes on after its answer, without a box",
    110: "\\zzz is no command",
    131: "\\frac whose f was read as a form feed: no expression, in gold and answer alike",
    141: "a response without a box: `there are 12 distinct sequences`",
    155: "a response without a box: `3 hours ago`",
    162: "a response without a box: `increases by 100%`",
    171: "the last box holds 255; math-verify prefers the sentence `the final answer is`",
    186: "x in [-2,7] is -2 <= x <= 7; math-verify's test wants this order of the two not to be",
    217: "a gold whose box never closes",
    262: "1 + 1/e is not 1 - 1/e; math-verify's test wants it to be",
}


def test_math_verifys_own_pairs() -> None:
    """266 pairs of its public tests (huggingface/Math-Verify at 5d148cf, Apache-2.0), all at its
    default precision.

    Boxes of gold and response are read by the rule `boxes`; a response without one is taken whole.
    """
    disagreed = set()
    for line, case in enumerate(PUBLIC, start=1):
        golds = list(dict.fromkeys(boxes(case["gold"])))
        gold = "; ".join(golds) or case["gold"]
        answer = answers(case["answer"], "boxes", count_parts(gold)) or case["answer"]
        if (judge(gold, answer) == "correct") != case["correct"]:
            disagreed.add(line)
    assert len(PUBLIC) == 266
    assert disagreed == set(DISAGREED)


@pytest.mark.parametrize(
    ("gold", "response", "last", "together"),
    [
        ("(2,2), (6,2)", r"\boxed{(2,2)} and \boxed{(6,2)}", "wrong", "correct"),
        ("(2,2), (6,2)", r"\boxed{(6,2)}, \boxed{(2,2)}", "wrong", "correct"),
        ("k = 45, n = 2", r"$k = \boxed{45}, n = \boxed{2}$", "wrong", "correct"),
        ("k = 45, n = 2", r"$n = \boxed{2}$, $k = \boxed{45}$", "wrong", "correct"),
        ("k = 45, n = 2", r"$k = \boxed{2}, n = \boxed{45}$", "wrong", "wrong"),
        (r"\{1, 2\}", r"\boxed{1} or \boxed{2}", "wrong", "correct"),
        ("(3,4)", r"x = \boxed{3}, y = \boxed{4}", "wrong", "correct"),
        ("1, 2", r"\boxed{1}, \boxed{2}, \boxed{3}", "wrong", "wrong"),
        ("7", r"\boxed{5}, no: \boxed{7}", "correct", "correct"),
        ("5", r"\boxed{5}, no: \boxed{7}", "wrong", "wrong"),
        ("1, 2", r"so \boxed{2, 1}", "correct", "correct"),
        ("1, 2", r"\boxed{1} and \boxed{2", "no_answer", "no_answer"),
        ("1, 2", "1 and 2", "no_answer", "no_answer"),
    ],
)
def test_several_boxes(gold: str, response: str, last: str, together: str) -> None:
    rules: tuple[tuple[Place, str], ...] = (("last_box", last), ("boxes", together))
    for rule, status in rules:
        answer = Extractor(rule)(response, gold)
        assert ("no_answer" if answer is None else judge(gold, answer)) == status


def test_boxes_far_apart_are_two_statements() -> None:
    far = r"\boxed{1} is what the first part asks for, which leaves the second one still to be worked out \boxed{2}"
    assert boxes(far) == ["2"]
    assert boxes(r"\boxed{\boxed{5}}") == [r"\boxed{5}"]
    assert boxes(r"$x_1 = \boxed{3}$ and $x_2=\boxed{y = 4}$") == ["x_1 = 3", "y = 4"]


def test_the_tables_in_the_docs_are_true() -> None:
    page = (Path(__file__).parents[3] / "docs" / "grading.md").read_text(encoding="utf-8")
    rows = page.split("| gold | right | wrong |\n|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    misjudged, count = [], 0
    for row in rows:
        gold, right, wrong = (
            re.findall(r"`([^`]*)`", cell) for cell in row.removeprefix("| ").split(" | ")
        )
        for answer, correct in [(text, True) for text in right] + [(text, False) for text in wrong]:
            count += 1
            if (judge(gold[0], answer) == "correct") != correct:
                misjudged.append((gold[0], answer, correct))
    assert misjudged == []
    assert count > 80


def _golds(folder: Path | str) -> list[str]:
    names = ("gsm8k_test", "math500", "aime24")
    problems = [
        problem
        for name in names
        for problem in load_problems(DatasetConfig(path=f"{folder}/{name}.jsonl"))
    ]
    return list(dict.fromkeys(problem.gold for problem in problems))


def _check_respellings(golds: list[str]) -> int:
    """Each gold against itself and its respellings, 20 at least; returns how many pairs there
    were.
    """
    count = 0
    for gold in golds:
        pairs = list(respellings(gold))
        assert len(pairs) >= 20
        lost = [
            (name, text)
            for name, text in [("itself", gold), *pairs]
            if judge(gold, text) != "correct"
        ]
        assert (gold, lost) == (gold, [])
        count += len(pairs)
    return count


def test_usual_respellings_of_the_copied_golds_are_right() -> None:
    assert len(RESPELLINGS) == 45
    assert _check_respellings(_golds(DATA)) > 2000


def test_usual_respellings_of_every_gold_are_right() -> None:
    folder = os.environ.get("EFR_DATA")
    if not folder:
        pytest.skip("EFR_DATA names no folder with the full gsm8k, math500 and aime24 files")
    assert _check_respellings(_golds(folder)) > 15_000


def test_pairs_without_algebra_take_less_than_a_millisecond() -> None:
    """Plain numbers, letters, units and equal texts, each pair new; CPU time, so that a loaded
    machine counts alike.
    """
    pairs = [(f"{i}.5", f"{i}.50") for i in range(200)] + [
        (f"{i}", f"\\frac{{{2 * i}}}{{2}}") for i in range(200)
    ]
    pairs += [(f"{i} dollars", f"\\${i}.00") for i in range(200)] + [
        (f"name {i}", f"Name {i}.") for i in range(200)
    ]
    pairs += [("C", f"(C) {i}") for i in range(200)] + [
        (f"\\sqrt{{{i}}}", f"$\\sqrt{{{i}}}$.") for i in range(200)
    ]
    for gold, _ in pairs:
        judge(gold, gold)
    started = time.process_time()
    verdicts = {judge(gold, answer) for gold, answer in pairs}
    assert time.process_time() - started < 1e-3 * len(pairs)  # 0.1 ms each on an idle core
    assert verdicts == {"correct"}
