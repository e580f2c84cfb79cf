"""Refuses gold answers that the grader could never find right, before a run starts."""

from __future__ import annotations

import re
from collections.abc import Iterable

from megatron_efr.errors import UserError
from megatron_efr.grading.pool import Grader

_SHOWN = 20


class GoldError(UserError, ValueError):
    """Gold answers that do not parse, or do not equal themselves; the message lists them with file
    and line.
    """


def check_golds(golds: Iterable[tuple[str, str]], timeout_s: float = 5.0, workers: int = 1) -> None:
    """Check (where, gold) pairs, `where` being "file:line"; GoldError names each gold that is no
    answer to itself.
    """
    rows = list(golds)
    answers = [gold for _, gold in rows]
    with Grader(workers, timeout_s) as grader:
        grades = grader.compare(answers, answers)
    bad: list[tuple[str, str, str]] = []
    for (where, gold), grade in zip(rows, grades, strict=True):
        if is_note(gold):
            bad.append((where, gold, "note"))
        elif not grade.correct:
            bad.append((where, gold, grade.status))
    if not bad:
        return
    lines = [
        f"{where}: {gold!r}: {_REASONS.get(status, status)}" for where, gold, status in bad[:_SHOWN]
    ]
    if len(bad) > _SHOWN:
        lines.append(f"... and {len(bad) - _SHOWN} more")
    raise GoldError(
        (f"{len(bad)} of {len(rows)} gold answers cannot be graded against:\n") + "\n".join(lines)
    )


def is_note(gold: str) -> bool:
    """True if `gold` says something about an answer (`see solution`, `n/a`, a proof, a long
    sentence) and is none.
    """
    text = " ".join(gold.split()).strip(" .:;!")
    if text in _NULLS or _NOTE.fullmatch(text):
        return True
    return len(_BARE_WORD.findall(_TEXT.sub(" ", text))) >= _SENTENCE


_NULLS = {"", "None", "null", "NULL", "nan", "NaN", "NA", "-", "--", "?", "??", "???"}
_NOTE = re.compile(
    r"(?:please )?(?:see|refer to|cf\.?|check|consult)\b.*|n\.?/a\.?|tb[ad]|todo|(?:the )?proof\b.*|"
    r"(?:prove|show|explain|justify|verify|discuss|sketch|draw|describe)\b.+|(?:solution |answer )?omitted\b.*|"
    r"not (?:available|applicable|given|provided|found|known)|(?:no|missing|unknown) (?:answer|response)s?\b.*|"
    r"(?:solution|answer)s? (?:above|below|unavailable|not .*|missing)|"
    r"(?:the )?answers? (?:may |will |can )?var(?:y|ies)\b.*|"
    r"(?:the )?(?:final )?answer is\b.*|\[?(?:figure|image|diagram|graph)\]?|open[- ]ended",
    re.IGNORECASE,
)
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|operatorname)\w*\s*\{[^{}]*\}")
_BARE_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_SENTENCE = 9  # bare words, outside \text{}, from which a gold is prose

_REASONS = {
    "note": "is a note about an answer, not one; give the answer itself, or leave the row out",
    "bad_gold": "does not parse as mathematics; write it as LaTeX, such as 3/4 or \\frac{3}{4}",
    "wrong": "does not equal itself under math-verify",
    "unparsed": "parses as a gold answer but not inside \\boxed{}",
    "timeout": "takes longer than the time limit to compare with itself",
}
