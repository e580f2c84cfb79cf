"""Finds what lies under an evaluation's name: its finished record, or the answers that it was
killed with.

Both say what was asked, and of another evaluation neither is taken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_efr.durable import remove_torn_writes, write_atomic
from megatron_efr.errors import UserError
from megatron_efr.evaluation.stored import read_evaluation
from megatron_efr.rollout.journal import Journal


class EvaluationError(UserError):
    """Another evaluation lies under the same name. The message says what differs, and what would be
    right.
    """


ASKED = "asked"  # the key of a record that says what was asked, and how it was judged


def finished(record: Path, asked: Mapping[str, Any], replace: bool) -> dict[str, Any] | None:
    """The record that is there, if it is of this very evaluation; None if none is, or one to
    `replace`.

    EvaluationError if it is another evaluation's: it names what differs.
    """
    if not record.exists():
        return None
    there = read_evaluation(record)
    if there.get(ASKED) == asked:
        return there
    if replace:
        return None
    if ASKED in there:
        why = (
            "is the record of another evaluation than this; it differs "
            f"in\n{_differences(there[ASKED], asked)}"
        )
    else:
        why = "is a record that does not say what was asked\n"
    raise EvaluationError(
        f"{record}: {why}give this one another name (--record), or write over that one (--replace)"
    )


class Unfinished:
    """Beside the record that an evaluation will write: `unfinished/<its name>.jsonl`, and `.json`
    with what is asked.

    `asked` says which model is asked what, and how, by name. A journal of something else that lies
    there is forgotten if it is to `replace`; otherwise EvaluationError names what differs.
    """

    def __init__(self, record: Path, asked: Mapping[str, Any], replace: bool = False) -> None:
        place = _place(record)
        self.journal = Journal(f"{place}.jsonl")
        self._asked = Path(f"{place}.json")
        there = _read_asked(place)
        if self.journal.path.exists() and there != asked:
            if not replace:
                raise EvaluationError(
                    f"{self.journal.path}: holds answers of another evaluation, which was not "
                    f"finished; it differs in\n{_differences(there, asked)}give this one another "
                    "name (--record), set these as they are there, or forget those answers "
                    "(--replace)"
                )
            self.journal.clear()
        remove_torn_writes(record.parent, record.name)
        remove_torn_writes(place.parent, self._asked.name)
        write_atomic(self._asked, json.dumps(asked, indent=1) + "\n")

    def clear(self) -> None:
        """The record is written: forget the answers, and then what they answer."""
        self.journal.clear()
        self._asked.unlink()


def forget(record: Path, asked: Mapping[str, Any]) -> None:
    """Remove the answers to `asked` that a kill left beside its finished record; another
    evaluation's stay.
    """
    if _read_asked(_place(record)) == asked:
        Unfinished(record, asked).clear()


def _place(record: Path) -> Path:
    return record.parent / "unfinished" / record.stem


def _read_asked(place: Path) -> dict[str, Any]:
    """Read which questions the answers at a place answer; empty if there are none."""
    path = Path(f"{place}.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    keys = [key for key in dict.fromkeys([*there, *asked]) if there.get(key) != asked.get(key)]
    return "".join(f"  {key}: there {there.get(key)}, here {asked.get(key)}\n" for key in keys)
