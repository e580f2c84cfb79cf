"""Turns a data set's rows into problems: question, gold answer, difficulty, and where each was
written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from typing import Any, Literal

from megatron_efr.config import DatasetConfig
from megatron_efr.data.readers import DatasetError, Row, read_rows

_QUESTION = ("question", "problem", "prompt")
_ANSWER = ("answer", "final_answer", "gold", "target")
_DIFFICULTY = ("difficulty", "level")
_ID = ("unique_id", "id")

# 1,234, and no (1,234)
_GROUPED = re.compile(r"[^\d,()\[\]{}]*\d{1,3}(?:,\d{3})+(?:\.\d+)?[^\d,()\[\]{}]*")
_THOUSANDS = re.compile(r",(?=\d{3})")

GoldCheck = Callable[[Iterable[tuple[str, str]]], None]


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its reference answer.

    `id` is "<data set>/<the row's own id, or its number>": the same in every epoch, run and resume.
    `where` is "file:line". `difficulty` is the value to report by, None if the data has none.
    """

    id: str
    question: str
    gold: str
    difficulty: str | int | float | None
    where: str
    dataset: str


def dataset_name(config: DatasetConfig) -> str:
    """The name in reports: as configured, else the file's stem or the last part of the hub name."""
    return config.known_as


def load_problems(config: DatasetConfig, check_golds: GoldCheck | None = None) -> list[Problem]:
    """Read `config`'s rows; DatasetError names file, line and columns of a row without question or
    answer.

    `check_golds` is given every ("file:line", gold) and raises when one does not parse; the
    programs hand in `grading.check_golds`.
    """
    rows = read_rows(config.path, config.split, config.limit)
    name = dataset_name(config)
    questions = ("problem", *_QUESTION) if config.format == "math" else _QUESTION
    seen: set[str] = set()
    problems = []
    for row in rows:
        question = _text(row, _column(row, config.question, questions, "question"), "question")
        answer = _text(row, _column(row, config.answer, _ANSWER, "answer"), "answer")
        key = _identity(row)
        # the first keeps the row's own id, so that a longer file changes no earlier id
        if key in seen:
            key = f"{key}#{row.number}"
        seen.add(key)
        gold = _gold(row, answer, config.format)
        problems.append(
            Problem(f"{name}/{key}", question, gold, _difficulty(row, config), row.where, name)
        )
    if check_golds is not None:
        check_golds((problem.where, problem.gold) for problem in problems)
    return problems


def _column(row: Row, configured: str | None, known: tuple[str, ...], kind: str) -> str:
    """The name of the row's column that holds `kind`."""
    if configured is not None:
        if configured in row.columns:
            return configured
        raise DatasetError(
            f"{row.where}: no column {configured!r} for the {kind}; the row has {_columns(row)}"
        )
    for name in known:
        if name in row.columns:
            return name
    raise DatasetError(
        f"{row.where}: no {kind}: none of {', '.join(known)} is a column; the row has "
        f"{_columns(row)} (set the data set's `{kind}` to one of them)"
    )


def _text(row: Row, column: str, kind: str) -> str:
    """The column's value as text; a number's text has its digits and no exponent (0.00001, not
    1e-05).
    """
    value: Any = row.columns[column]
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float | Decimal):
        exact = Decimal(repr(value)) if isinstance(value, float) else value
        if exact.is_finite():
            return f"{exact:f}"
    raise DatasetError(
        f"{row.where}: the {kind} in column {column!r} is {_refused(value, kind)}; the row has "
        f"{_columns(row)}"
    )


def _refused(value: Any, kind: str) -> str:
    """The words for a value that no text can be made of, and for how it may have come about."""
    match value:
        case None:
            return "null"
        case bool():
            word = str(value).lower()
            return f"the boolean {word}, not text (write the word as text if it is the {kind})"
        case float() | Decimal():
            return f"{value}, which is no number that an answer can equal"
        case date() | time():
            return (
                f"a {type(value).__name__}, not text (the library datasets makes dates of a JSON "
                "file's text if all of it looks like dates; read by its own path, FILE.jsonl, it "
                "stays text)"
            )
        case str():
            return "empty"
        case _:
            return f"a {type(value).__name__}, not text"


def _columns(row: Row) -> str:
    return "columns " + ", ".join(map(str, row.columns)) if row.columns else "no columns"


def _gold(row: Row, answer: str, form: Literal["auto", "gsm8k", "math", "columns"]) -> str:
    """The answer alone: GSM8K writes a worked solution, then `#### 1,234`."""
    if form == "gsm8k" or (form == "auto" and "####" in answer):
        _, mark, last = answer.rpartition("####")
        gold = (
            _THOUSANDS.sub("", last.strip()) if _GROUPED.fullmatch(last.strip()) else last.strip()
        )
        if not mark or not gold:
            raise DatasetError(
                f"{row.where}: a gsm8k answer ends with '#### <answer>', this one with "
                f"{answer[-40:]!r}"
            )
        return gold
    return answer.strip()


def _difficulty(row: Row, config: DatasetConfig) -> str | int | float | None:
    """A text or a number, whatever the column holds; None if it says nothing."""
    if config.difficulty is not None:
        value = row.columns[_column(row, config.difficulty, (), "difficulty")]
    else:
        value = next((row.columns[name] for name in _DIFFICULTY if name in row.columns), None)
    # NaN: a table has nothing there
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return value if type(value) in (str, int, float) else str(value)


def _identity(row: Row) -> str:
    """The row's own id if it has one, else its number."""
    return next(
        (str(row.columns[name]) for name in _ID if row.columns.get(name) is not None),
        str(row.number),
    )
