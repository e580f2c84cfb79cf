"""Grades whole groups: what was cut off is wrong and is not asked about."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_efr.grading.pool import Grader
from megatron_efr.types import Group

TRUNCATED = "truncated"


def grade_groups(grader: Grader, groups: Sequence[Group]) -> None:
    """Set `correct` and `statuses` of every group, in place."""
    answers = [(group, r) for group in groups for r in group.responses if not r.truncated]
    grades = iter(grader.grade([r.text for _, r in answers], [group.prompt.gold for group, _ in answers]))
    for group in groups:
        group.statuses = [TRUNCATED if r.truncated else next(grades).status for r in group.responses]
        group.correct = np.array([status == "correct" for status in group.statuses], dtype=bool)
