"""Refuses, before a run starts, gold answers that a data set's own verifiers could never find
right.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_efr.config import GradingConfig
from megatron_efr.grading.golds import GoldError, check_golds
from megatron_efr.grading.judging import Judging
from megatron_efr.grading.pool import Grader
from megatron_efr.grading.verdict import MATH, Question, Verifier

_SHOWN = 20


def check_for(judging: Judging, config: GradingConfig, golds: Iterable[tuple[str, str]]) -> None:
    """Check ("file:line", gold) pairs by every verifier of `judging`; GoldError lists those that
    one cannot read.

    GraderError if a verifier cannot be loaded.
    """
    rows = list(golds)
    verifiers = list(dict.fromkeys(part.verifier for part in judging.parts))
    others = [verifier for verifier in verifiers if verifier.name != MATH.name]
    if others:
        with Grader.of(config, others) as grader:
            for verifier in others:
                _check(grader, verifier, rows)
    if len(others) < len(verifiers):
        check_golds(rows, config.timeout_s, config.workers)


def _check(grader: Grader, verifier: Verifier, rows: list[tuple[str, str]]) -> None:
    grades = grader.ask([Question(verifier, gold, "", "gold") for _, gold in rows])
    bad = [(*row, grade) for row, grade in zip(rows, grades, strict=True) if not grade.correct]
    if not bad:
        return
    lines = [
        f"{where}: {gold!r}: {grade.reason or grade.status}" for where, gold, grade in bad[:_SHOWN]
    ]
    if len(bad) > _SHOWN:
        lines.append(f"... and {len(bad) - _SHOWN} more")
    raise GoldError(
        (
            f"{len(bad)} of {len(rows)} gold answers cannot be judged against by the verifier "
            f"{verifier.name}:\n"
        )
        + "\n".join(lines)
    )
