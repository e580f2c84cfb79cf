"""Judges an evaluation's groups: right or wrong, which answers are equal, and what was forced early beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from megatron_efr.evaluation.records import Early
from megatron_efr.grading import Grader
from megatron_efr.grading.equality import equal_answers
from megatron_efr.grading.groups import grade_groups
from megatron_efr.grading.judging import Judgings
from megatron_efr.types import Grade, Graded, Group, Response

_FORCED = "summary"  # the branches of the script `forks` within a thought


class Judged(NamedTuple):
    """Graded groups, the numbers of their answers (equal numbers are equal answers of a problem), what was forced."""

    graded: list[Graded]
    answers: list[list[int | None]]
    early: Early | None


def judge(groups: Sequence[Group], at: Sequence[int], grader: Grader, judgings: Judgings) -> Judged:
    """Judge the responses, and the answers that were forced at each of the lengths `at` of them."""
    graded = grade_groups(grader, groups, judgings, branches=bool(at))
    if not at:
        return Judged(graded, equal_answers(grader, graded, judgings), None)
    numbers = equal_answers(grader, [_with_direct(one) for one in graded], judgings)
    sizes = [len(group.responses) for group in groups]
    answers = [own[:size] for own, size in zip(numbers, sizes, strict=True)]
    direct = [own[size:] for own, size in zip(numbers, sizes, strict=True)]
    right = [_right(one, at) for one in graded]
    return Judged(graded, answers, Early(tuple(at), right, direct if 0 in at else []))


def _with_direct(graded: Graded) -> Graded:
    """The group with the answers that were forced before any thought as responses of their own, behind the others."""
    pairs = [
        (replace(answer, finish="stop"), grade)  # its few tokens end when they are used up: it is judged all the same
        for found in _forced(graded)
        for answer, grade in found.get(0, ())
    ]
    group = replace(graded.group, responses=(*graded.group.responses, *(answer for answer, _ in pairs)))
    return Graded(group, (*graded.grades, *(grade for _, grade in pairs)))


def _right(graded: Graded, at: Sequence[int]) -> list[list[float]]:
    """The share of right answers at each length, [samples][lengths]."""
    shares = []
    for own, found in zip(graded.grades, _forced(graded), strict=True):
        grades = {length: [grade for _, grade in answers] for length, answers in found.items()}
        shares.append([_share(grades.get(length, [own])) for length in at])
    return shares


def _forced(graded: Graded) -> list[dict[int, list[tuple[Response, Grade]]]]:
    """For each response the answers that were forced within its thought, with their grades, by length."""
    found = []
    for response, grades in zip(graded.group.responses, graded.branches, strict=True):
        forced: dict[int, list[tuple[Response, Grade]]] = {}
        judged = iter(grades)
        for branch in response.branches:
            answers = [(answer, next(judged)) for answer in branch.responses]
            if branch.part == _FORCED:
                forced.setdefault(branch.at, []).extend(answers)
        found.append(forced)
    return found


def _share(grades: Sequence[Grade]) -> float:
    return sum(grade.correct for grade in grades) / len(grades)
