"""Grades whole groups, each by its data set's verifiers: what was cut off is wrong and is not asked
about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_efr.grading.judging import Judging, Judgings
from megatron_efr.grading.pool import Grader
from megatron_efr.grading.verdict import Question
from megatron_efr.types import Grade, Graded, Group, Response

TRUNCATED = Grade("truncated")


def grade_groups(
    grader: Grader,
    groups: Sequence[Group],
    judgings: Judgings | None = None,
    *,
    branches: bool = False,
) -> list[Graded]:
    """The verdicts on every group's responses, and on the answers of their `branches`, all asked of
    `grader` at once.

    The data set's first verifier says what is correct. A score is the mean of its verifiers' scores
    by weight. A branch's answer is judged by its own text, and also if it was cut off: its few
    tokens end when they are used up.
    """
    # all questions at once, so that the verifiers' processes are busy
    judgings = judgings or Judgings()
    asked = [(group, judging_of(group, judgings)) for group in groups]
    questions = [
        _question(response, group, judging, k)
        for group, judging in asked
        for response in _judged(group, branches)
        for k in range(len(judging.parts))
    ]
    grades = iter(grader.ask(questions))

    # the answers come in the same order, one for each part of a judging
    def verdict(judging: Judging) -> Grade:
        return _together([next(grades) for _ in judging.parts], judging)

    # a response that was cut off is not asked about
    graded = []
    for group, judging in asked:
        said = tuple(
            TRUNCATED if response.truncated else verdict(judging) for response in group.responses
        )
        tried = tuple(
            tuple(verdict(judging) for _ in response.answers)
            for response in group.responses
            if branches
        )
        graded.append(Graded(group, said, tried))
    return graded


def _judged(group: Group, branches: bool) -> list[Response]:
    """The responses that a grader is asked about: the group's, and behind them the answers of
    branches.
    """
    ended = [response for response in group.responses if not response.truncated]
    return ended + [
        each for response in group.responses if branches for _, each in response.answers
    ]


def judging_of(group: Group, judgings: Judgings) -> Judging:
    """Judgings of a group's answers: those of its data set."""
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
