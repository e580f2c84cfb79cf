"""Grades whole groups, each by its data set's verifiers: what was cut off is wrong and is not asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_efr.grading.judging import Judging, Judgings
from megatron_efr.grading.pool import Grader
from megatron_efr.grading.verdict import Question
from megatron_efr.types import Grade, Graded, Group, Response

TRUNCATED = Grade("truncated")


def grade_groups(grader: Grader, groups: Sequence[Group], judgings: Judgings | None = None) -> list[Graded]:
    """The verdicts on every group's responses, all asked of the `grader` at once.

    The data set's first verifier says what is correct. A score is the mean of its verifiers' scores by weight.
    """
    judgings = judgings or Judgings()
    asked = [(group, judging_of(group, judgings)) for group in groups]
    questions = [
        _question(response, group, judging, k)
        for group, judging in asked
        for response in group.responses
        if not response.truncated
        for k in range(len(judging.parts))
    ]
    grades = iter(grader.ask(questions))
    graded = []
    for group, judging in asked:
        said = [None if r.truncated else [next(grades) for _ in judging.parts] for r in group.responses]
        graded.append(Graded(group, tuple(TRUNCATED if each is None else _together(each, judging) for each in said)))
    return graded


def judging_of(group: Group, judgings: Judgings) -> Judging:
    """How a group's answers are judged: as its data set's are."""
    return judgings.of_dataset(group.prompt.meta.get("dataset"))


def _question(response: Response, group: Group, judging: Judging, k: int) -> Question | None:
    part = judging.parts[k]
    answer = part.extractor(response.text, group.prompt.gold)
    return None if answer is None else Question(part.verifier, group.prompt.gold, answer)


def _together(grades: Sequence[Grade], judging: Judging) -> Grade:
    """The first verifier's grade, with the mean of all scores by weight, from 0 to 1."""
    weights = [part.weight for part in judging.parts]
    total = sum(weight * grade.score for weight, grade in zip(weights, grades, strict=True))
    return replace(grades[0], partial=total / sum(weights))
