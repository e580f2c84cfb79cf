"""Built-in verifiers: exact, choice, numeric, regex; and where in a response the answer stands."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_efr.grading import Grader
from megatron_efr.grading.extract import Extractor, after_marker, last_number
from megatron_efr.grading.verdict import BAD_GOLD, CORRECT, UNPARSED, WRONG, Verifier
from tests.unit.grading import test_verifiers
from tests.unit.grading.test_verifiers import verdicts

pytestmark = pytest.mark.alike

grader = test_verifiers.grader
package = test_verifiers.package


@pytest.mark.parametrize(
    ("answer", "gold", "options", "status"),
    [
        ("Paris", "Paris", {}, CORRECT),
        ("  New\n York ", "New York", {}, CORRECT),
        ("paris", "Paris", {}, WRONG),
        ("PARIS", "Paris", {"ignore_case": True}, CORRECT),
        ("0.5", "1/2", {}, WRONG),
    ],
)
def test_exact(answer: str, gold: str, options: dict[str, Any], status: str) -> None:
    assert verdicts(Verifier.of("exact", options), (answer, gold)) == [status]


@pytest.mark.parametrize(
    "answer",
    [
        r"C",
        r"c",
        r"(C)",
        r"C.",
        r"C. 5",
        r"C) five",
        r"[C]",
        r"(C) five",
        r"\text{C}",
        r"\textbf{(C)}",
        r"**C**",
        r"$C$",
        r"Option C",
        r"answer: C",
        r"\mathrm{\text{C}}",
        r"Answer is (c)",
    ],
)
def test_every_spelling_of_an_option_is_its_letter(answer: str) -> None:
    assert verdicts(Verifier("choice"), (answer, "C"), (answer, "D"), ("C", answer)) == [
        CORRECT,
        WRONG,
        CORRECT,
    ]


@pytest.mark.parametrize("answer", ["", "5", "CD", "Cats", "A cat", "both A and B", "12"])
def test_what_is_no_option_letter_is_unparsed(answer: str) -> None:
    assert verdicts(Verifier("choice"), (answer, "A")) == [UNPARSED]


@pytest.mark.parametrize(
    ("answer", "gold", "options", "status"),
    [
        ("1,234.50", "1234.5", {}, CORRECT),
        ("$1{,}234$", "1234", {}, CORRECT),
        ("3/4", "0.75", {}, CORRECT),
        (r"-\frac{3}{4}", "-0.75", {}, CORRECT),
        ("1e-3", "0.001", {}, CORRECT),
        ("50%", "0.5", {}, CORRECT),
        (r"50\%", "50", {}, WRONG),
        ("\u22125", "-5", {}, CORRECT),
        ("0.3333333", "1/3", {}, CORRECT),
        ("0.3333", "1/3", {}, WRONG),
        ("0.3333", "1/3", {"relative": 1e-3}, CORRECT),
        ("10.4", "10", {"relative": 0, "absolute": 0.5}, CORRECT),
        ("10.6", "10", {"relative": 0, "absolute": 0.5}, WRONG),
        ("12345678901234567891", "12345678901234567890", {"relative": 0}, WRONG),
        ("five", "5", {}, UNPARSED),
        ("1/0", "5", {}, UNPARSED),
        ("", "5", {}, UNPARSED),
        ("5", "five", {}, BAD_GOLD),
        ("1,23", "123", {}, UNPARSED),
        ("1e99999999", "5", {}, UNPARSED),
    ],
)
def test_numeric(answer: str, gold: str, options: dict[str, Any], status: str) -> None:
    assert verdicts(Verifier.of("numeric", options), (answer, gold)) == [status]


@pytest.mark.parametrize(
    ("answer", "gold", "options", "status"),
    [
        ("color", "colou?r", {}, CORRECT),
        ("a color", "colou?r", {}, WRONG),
        ("a color", "colou?r", {"search": True}, CORRECT),
        ("COLOUR", "colou?r", {"ignore_case": True}, CORRECT),
        ("color", "(", {}, BAD_GOLD),
    ],
)
def test_regex(answer: str, gold: str, options: dict[str, Any], status: str) -> None:
    assert verdicts(Verifier.of("regex", options), (answer, gold)) == [status]


def test_a_pattern_that_backtracks_without_end_costs_its_own_answer_alone(grader: Grader) -> None:
    answers, golds = ["b", "a" * 60 + "!", "c"], ["b", "(a+)+", "d"]
    assert [g.status for g in grader.compare(answers, golds, Verifier("regex"))] == [
        "correct",
        "timeout",
        "wrong",
    ]


# -- where the answer stands
# -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Answer: 5", "5"),
        ("Answer: 5\nAnswer: 6\nDone.", "6"),
        ("**Answer:** Paris", "Paris"),
        ("Answer:\n\n  C. five \nmore", "C. five"),
        ("Answer:  \n ", None),
        ("answer: 5", None),
    ],
)
def test_after_a_marker(text: str, found: str | None) -> None:
    assert after_marker(text, "Answer:") == found
    assert Extractor("marker", "Answer:")(text, "") == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("first 3, then 4.", "4"),
        ("it is 1,234,567.50 dollars", "1234567.50"),
        ("costs $1{,}234", "1234"),
        ("x = -5", "-5"),
        ("5-3", "3"),
        ("so 7 = 10 - 3", "3"),
        ("x2 has no number", None),
        ("about 3/4", "3/4"),
        (r"50\% of it", "50%"),
        ("1e-3", "1e-3"),
        (".5", ".5"),
        ("between 1 and \u22122", "-2"),
        ("1, 2, 3", "3"),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number(text: str, found: str | None) -> None:
    assert last_number(text) == found


def test_whole_responses() -> None:
    assert Extractor("whole")("  a\nb ", "") == "a\nb"
    assert Extractor("whole")(" \n ", "") is None
