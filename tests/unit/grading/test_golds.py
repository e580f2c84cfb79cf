"""Gold answers are checked before a run starts."""

import os
from pathlib import Path

import pytest

from megatron_efr.config import DatasetConfig
from megatron_efr.data.datasets import load_problems
from megatron_efr.grading import GoldError, check_golds

pytestmark = pytest.mark.alike

HERE = Path(__file__).parents[2] / "data"
ROWS = {"gsm8k_train": 7473, "gsm8k_test": 1319, "math500": 500, "aime24": 30}


@pytest.mark.parametrize(
    ("name", "rows"), [("gsm8k_train", 30), ("gsm8k_test", 30), ("math500", 40), ("aime24", 30)]
)
def test_golds_of_the_copied_rows_parse(name: str, rows: int) -> None:
    assert len(load_problems(DatasetConfig(path=str(HERE / f"{name}.jsonl")), check_golds)) == rows


@pytest.mark.parametrize("name", ROWS)
def test_every_gold_of_the_full_files_parses(name: str) -> None:
    folder = os.environ.get("EFR_DATA")
    if not folder:
        pytest.skip("EFR_DATA names no folder with the full gsm8k, math500 and aime24 files")
    assert (
        len(load_problems(DatasetConfig(path=f"{folder}/{name}.jsonl"), check_golds)) == ROWS[name]
    )


def test_bad_golds_are_listed_with_file_and_line() -> None:
    golds = [
        ("a.jsonl:1", "17"),
        ("a.jsonl:2", "(("),
        ("b.jsonl:9", r"\frac{1}{2}"),
        ("b.jsonl:11", ""),
    ]
    with pytest.raises(GoldError) as error:
        check_golds(golds)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("2 of 4 gold answers")
    assert [line.split(": ")[0] for line in lines[1:]] == ["a.jsonl:2", "b.jsonl:11"]
    assert "does not parse" in lines[1]


def test_many_bad_golds_are_counted() -> None:
    with pytest.raises(GoldError, match=r"25 of 25 .*(?s:.)*\.\.\. and 5 more"):
        check_golds((f"a.jsonl:{i}", "((") for i in range(25))


NOTES = [
    "see solution", "n/a", "N/A", "Proof.", "The proof follows from "
        "Lemma 2", "None", "nan", "?", "Answers will vary",
    "Prove that it converges", "The answer is 5", "a long sentence in which nothing is said "
        "that anyone could check",
]  # fmt: skip
ANSWERS = [
    "no solution", "Evelyn", "5 or more", "undefined", "none", "all real numbers", "east", "-5",
    "DNE", "[0, oo)",
    r"\text{The midpoints of the sides of the figure form a regular hexagon}",
    r"n \equiv 1 \pmod 3", "2516_8",
    r"x = \frac{1}{2}, x = \frac{-1 \pm \sqrt{13}}{4}", r"1, 2, \dots, n", "12:30", "18 dollars",
]  # fmt: skip


def test_notes_are_refused_with_their_lines_and_answers_in_words_are_not() -> None:
    with pytest.raises(GoldError) as error:
        check_golds((f"a.jsonl:{line}", gold) for line, gold in enumerate(NOTES + ANSWERS, start=1))
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{len(NOTES)} of {len(NOTES + ANSWERS)} gold answers")
    for number, (line, gold) in enumerate(zip(lines[1:], NOTES, strict=True), start=1):
        assert line.startswith(f"a.jsonl:{number}: {gold!r}: is a note about an answer, not one")
