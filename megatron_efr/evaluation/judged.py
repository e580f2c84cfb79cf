"""Judges an evaluation's groups: right or wrong, which answers are equal, and what a script tried
beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

from megatron_efr.evaluation.records import Early, Subthoughts
from megatron_efr.grading import Grader
from megatron_efr.grading.equality import equal_answers
from megatron_efr.grading.groups import grade_groups
from megatron_efr.grading.judging import Judgings
from megatron_efr.scripts import SCRIPTS, Forks
from megatron_efr.types import Grade, Graded, Group, Response, Script

_FORCED = "summary"  # the branches of the script `forks` within a thought
Tried = list[tuple[Response, Grade]]


class Judged(NamedTuple):
    """Graded groups, the numbers of their answers (equal numbers are equal answers of a problem),
    what was tried.
    """

    graded: list[Graded]
    answers: list[list[int | None]]
    early: Early | None = None
    subthoughts: Subthoughts | None = None


def judge(groups: Sequence[Group], script: Script, grader: Grader, judgings: Judgings) -> Judged:
    """Judge the responses, and the answers that the scripts `forks` and `subthoughts` tried beside
    them.
    """
    forks, later = isinstance(script, Forks), isinstance(script, SCRIPTS["subthoughts"])
    graded = grade_groups(grader, groups, judgings, branches=forks or later)
    # of all that was tried, direct answers and those of subthoughts are told apart as the
    # responses' are
    told = [[_told(own, 0 if forks else None) for own in _tried(one)] for one in graded]
    numbers = equal_answers(
        grader, [_with(one, own) for one, own in zip(graded, told, strict=True)], judgings
    )
    answers, beside = [], []
    for one, own, codes in zip(graded, told, numbers, strict=True):
        rest = iter(codes[len(one.grades) :])
        answers.append(codes[: len(one.grades)])
        beside.append([[next(rest) for _ in each] for each in own])
    if isinstance(script, Forks):
        direct = [list(chain.from_iterable(own)) for own in beside] if 0 in script.at else []
        return Judged(
            graded, answers, Early(script.at, [_right(one, script.at) for one in graded], direct)
        )
    if later:
        right = [[[grade.correct for _, grade in each] for each in own] for own in told]
        return Judged(graded, answers, subthoughts=Subthoughts(beside, right))
    return Judged(graded, answers)


def _with(graded: Graded, told: Sequence[Tried]) -> Graded:
    """The group with what was tried as responses of their own, behind the others."""
    pairs = [pair for each in told for pair in each]
    # their few tokens end when they are used up: such an answer is judged all the same
    answers = [replace(answer, finish="stop") for answer, _ in pairs]
    group = replace(graded.group, responses=(*graded.group.responses, *answers))
    return Graded(group, (*graded.grades, *(grade for _, grade in pairs)))


def _right(graded: Graded, at: Sequence[int]) -> list[list[float]]:
    """The share of right answers at each length, [samples][lengths]."""
    shares = []
    for own, found in zip(graded.grades, _tried(graded), strict=True):
        grades = [[grade for _, grade in found.get((_FORCED, length), ())] for length in at]
        shares.append([_share(each or [own]) for each in grades])
    return shares


def _tried(graded: Graded) -> list[dict[tuple[str, int], Tried]]:
    """For each response the answers of its branches, with their grades, by part and length; none if
    not graded.
    """
    found = []
    for response, grades in zip(graded.group.responses, graded.branches, strict=False):
        tried: dict[tuple[str, int], Tried] = {}
        judged = iter(grades)
        for branch in response.branches:
            tried.setdefault((branch.part, branch.at), []).extend(
                (each, next(judged)) for each in branch.responses
            )
        found.append(tried)
    return found


def _told(tried: dict[tuple[str, int], Tried], at: int | None) -> Tried:
    """The answers of one response that are told apart: those that were forced at this length, or
    all.
    """
    if at is not None:
        return tried.get((_FORCED, at), [])
    return [pair for answers in tried.values() for pair in answers]


def _share(grades: Sequence[Grade]) -> float:
    return sum(grade.correct for grade in grades) / len(grades)
