"""Votes count equal answers: classes of spellings, against brute force over all pairs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from megatron_efr.config import GradingConfig, JudgingConfig
from megatron_efr.evaluation.judged import judge
from megatron_efr.evaluation.records import summarise
from megatron_efr.grading import Grader
from megatron_efr.grading.equality import equal_answers
from megatron_efr.grading.groups import grade_groups
from megatron_efr.grading.judging import Judging, Judgings
from megatron_efr.scripts import SCRIPTS, Forks
from megatron_efr.types import Branch, Grade, Graded, Group, Prompt
from tests.groups import response

pytestmark = pytest.mark.alike

SPELLINGS = {
    Fraction(1, 2): ["0.5", "1/2", r"\frac{1}{2}", r"\frac12", r"\dfrac{2}{4}", "0.50"],
    Fraction(3, 4): ["0.75", "3/4", r"\frac{6}{8}"],
    Fraction(2): ["2", "2.0", "4/2", r"\frac{4}{2}"],
    Fraction(-7): ["-7", r"\frac{-14}{2}", "-7.0"],
}
VALUE = {spelling: value for value, spellings in SPELLINGS.items() for spelling in spellings}


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader.of(GradingConfig()) as pool:
        yield pool


def group(gold: str, answers: list[str | None], lengths: list[int] | None = None) -> Group:
    texts = ["none" if answer is None else rf"\boxed{{{answer}}}" for answer in answers]
    sizes = lengths or [3] * len(texts)
    responses = tuple(response(n, text=text) for text, n in zip(texts, sizes, strict=True))
    return Group(Prompt("a/1", (1,), "q", gold), responses)


def test_classes_are_those_of_brute_force_over_all_pairs(grader: Grader) -> None:
    rng = np.random.default_rng(0)
    golds = ["1/2", "0.75", "2", "9"]
    drawn = [[str(s) for s in rng.choice(list(VALUE), size=9)] for _ in golds]
    groups = [group(gold, list(answers)) for gold, answers in zip(golds, drawn, strict=True)]
    graded = grade_groups(grader, groups)
    for answers, numbers in zip(drawn, equal_answers(grader, graded), strict=True):
        for (one, n), (other, m) in itertools.combinations(zip(answers, numbers, strict=True), 2):
            assert (n == m) == (VALUE[one] == VALUE[other]), (one, other)


def test_votes_are_for_answers_and_not_for_spellings(grader: Grader) -> None:
    # by spelling 2 would win with two votes; by answer 1/2 has three
    voted = group("1/2", ["2", "0.5", "2", "1/2", r"\frac12", None], [9, 3, 9, 3, 3, 3])
    graded = grade_groups(grader, [voted])
    numbers = equal_answers(grader, graded)
    assert numbers == [[1, 0, 1, 0, 0, None]]
    record = summarise(graded, "m", answers=numbers)
    assert (record["majority"], record["shortest_majority"]) == (1.0, 1.0)


def test_each_pair_is_asked_once_however_many_problems_have_it(
    grader: Grader, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [group("9", ["0.5", "1/2", "0.75", "1/2"]) for _ in range(20)]
    graded = grade_groups(grader, groups)
    asked: list[object] = []
    ask = grader.ask
    monkeypatch.setattr(grader, "ask", lambda questions: asked.extend(questions) or ask(questions))
    assert equal_answers(grader, graded) == [[1, 1, 2, 1]] * 20
    assert len(asked) == len(set(asked)) == 4  # both ways: 0.5 with 1/2, 0.5 with 0.75


def test_what_could_not_be_judged_is_compared_with_nothing(
    grader: Grader, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses = ("wrong", "timeout", "timeout", "wrong")
    hostile = Graded(
        group("5", ["6", "9^{9^{9^{9}}}", "9^{9^{9^{9}}}", "7"]), tuple(map(Grade, statuses))
    )
    texts: list[str] = []
    ask = grader.ask
    monkeypatch.setattr(
        grader,
        "ask",
        lambda questions: (
            texts.extend(q.answer for q in questions if q is not None) or ask(questions)
        ),
    )
    assert equal_answers(grader, [hostile]) == [[1, 2, 2, 3]]
    assert sorted(texts) == ["6", "7"]


def test_right_answers_to_a_pattern_need_not_be_equal(grader: Grader) -> None:
    judgings = Judgings(Judging.of(JudgingConfig(verifier="regex")))
    voted = group("colou?r|red", ["color", "colour", "red", "red", "blue"])
    graded = grade_groups(grader, [voted], judgings)
    assert equal_answers(grader, graded, judgings) == [[1, 2, 3, 3, 4]]
    letters = Judgings(Judging.of(JudgingConfig(verifier="choice")))
    voted = group("A", ["(A)", "A", "b", "(B)", "C. x", "?"])
    graded = grade_groups(grader, [voted], letters)
    assert equal_answers(grader, graded, letters) == [[0, 0, 1, 1, 2, 3]]


def test_cut_off_responses_have_no_vote(grader: Grader) -> None:
    whole = group("5", ["5", "6"])
    cut = replace(
        whole, responses=(replace(whole.responses[0], finish="length"), whole.responses[1])
    )
    graded = grade_groups(grader, [cut])
    assert equal_answers(grader, graded) == [[None, 1]]


def test_answers_that_were_forced_early_are_judged_and_told_apart_as_the_responses_are(
    grader: Grader,
) -> None:
    def forced(at: int, *answers: str | None) -> Branch:
        made = group("1/2", list(answers)).responses
        return Branch("summary", at, tuple(replace(each, finish="length") for each in made))

    whole = group("1/2", ["0.5", "3", None], [9, 20, 3])
    branches = [
        (forced(0, "2/4", "3.0"), forced(8, "7", r"\frac12")),
        (forced(0, "4", None), forced(8, "0.5", "0.50"), forced(16, "3", "3")),
        (),
    ]
    responses = [
        replace(each, branches=own) for each, own in zip(whole.responses, branches, strict=True)
    ]
    judged = judge(
        [replace(whole, responses=tuple(responses))],
        Forks(at=(0, 8, 16), tokens=5),
        grader,
        Judgings(),
    )
    assert judged.early is not None
    assert [grade.correct for grade in judged.graded[0].grades] == [True, False, False]
    # its own if none was forced
    assert judged.early.right == [[[0.5, 0.5, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]]
    ((right, wrong, none),), (direct,) = judged.answers, judged.early.direct
    assert none is None
    # 4 is neither's answer
    assert list(direct) == [right, wrong, max(right or 0, wrong or 0) + 1, None]
    record = summarise(judged.graded, "m", answers=judged.answers, early=judged.early)
    assert record["rows"][0]["early"] == {"at": [0, 8, 16], "right": judged.early.right[0]}
    # the right one: one of three direct answers differs not; the wrong one: one of three
    assert record["measures"]["internal_bias"]["value"] == pytest.approx(2 / 3)
    assert record["measures"]["early@8"]["value"] == 0.5
    assert record["measures"]["underthinking"]["value"] == pytest.approx((1 - 8 / 20 + 0) / 2)
    later = judge(
        [replace(whole, responses=tuple(responses))], Forks(at=(8,), tokens=5), grader, Judgings()
    )
    assert later.early is not None
    assert (later.answers, later.early.direct) == (judged.answers, [])


def test_the_mode_of_a_responses_subthoughts_is_its_answer(grader: Grader) -> None:
    def later(*answers: str | None) -> tuple[Branch, ...]:
        """A branch for each."""
        made = group("1/2", list(answers)).responses
        return tuple(Branch("subthought", 3 * at, (each,)) for at, each in enumerate(made, 1))

    whole = group("1/2", ["3", "0.5", "3", "1/2"])
    branches = [
        later("3", "1/2", "3.0", "0.5", "2/4"),
        later("4", "0.5", "1/2", "4.0"),
        later(None, None),
        (),
    ]
    responses = tuple(
        replace(each, branches=own) for each, own in zip(whole.responses, branches, strict=True)
    )
    script = SCRIPTS["subthoughts"]()
    judged = judge([replace(whole, responses=responses)], script, grader, Judgings())
    record = summarise(judged.graded, "m", answers=judged.answers, subthoughts=judged.subthoughts)
    row = record["rows"][0]
    assert row["subthoughts"]["right"][1] == [False, True, True, False]
    codes = row["subthoughts"]["answers"]
    assert codes[0] == [row["answers"][i] for i in (0, 1, 0, 1, 1)]
    assert codes[2:] == [[None, None], []]
    # right by 3 to 2; a tie, whose earliest is wrong; no answer; none tried: the response's own
    assert record["measures"]["subthought_mode"]["value"] == 2 / 4
