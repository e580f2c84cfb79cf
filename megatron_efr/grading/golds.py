"""Refuses gold answers that the grader could never find right, before a run starts."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_efr.errors import UserError
from megatron_efr.grading.pool import Grader

_SHOWN = 20


class GoldError(UserError, ValueError):
    """Gold answers that do not parse, or do not equal themselves; the message lists them with file and line."""


def check_golds(golds: Iterable[tuple[str, str]], timeout_s: float = 5.0, workers: int = 1) -> None:
    """Check (where, gold) pairs, `where` being "file:line"; GoldError names each gold that is no answer to itself."""
    rows = list(golds)
    answers = [gold for _, gold in rows]
    with Grader(workers, timeout_s) as grader:
        grades = grader.compare(answers, answers)
    bad = [(*row, grade.status) for row, grade in zip(rows, grades, strict=True) if not grade.correct]
    if not bad:
        return
    lines = [f"{where}: {gold!r}: {_REASONS.get(status, status)}" for where, gold, status in bad[:_SHOWN]]
    if len(bad) > _SHOWN:
        lines.append(f"... and {len(bad) - _SHOWN} more")
    raise GoldError(f"{len(bad)} of {len(rows)} gold answers cannot be graded against:\n" + "\n".join(lines))


_REASONS = {
    "bad_gold": "does not parse as mathematics; write it as LaTeX, such as 3/4 or \\frac{3}{4}",
    "wrong": "does not equal itself under math-verify",
    "unparsed": "parses as a gold answer but not inside \\boxed{}",
    "timeout": "takes longer than the time limit to compare with itself",
}
