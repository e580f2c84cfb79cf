"""What an evaluation finds under its name: its finished record, or the answers that it was killed with.

Both say what was asked, and of another evaluation neither is taken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_efr.durable import remove_torn_writes, write_atomic
from megatron_efr.report.stored import read_evaluation
from megatron_efr.run.folder import Journal, RunFolderError

ASKED = "asked"  # the key of a record that says what was asked, and how it was judged


def finished(record: Path, asked: Mapping[str, Any], replace: bool) -> dict[str, Any] | None:
    """The record that is there, where it is of this very evaluation; None where none is, or one to `replace`.

    RunFolderError where it is another evaluation's: it names what differs.
    """
    if not record.exists():
        return None
    there = read_evaluation(record)
    if there.get(ASKED) == asked:
        return there
    if replace:
        return None
    if ASKED in there:
        why = f"is the record of another evaluation than this; it differs in\n{_differences(there[ASKED], asked)}"
    else:
        why = "is a record that does not say what was asked\n"
    raise RunFolderError(f"{record}: {why}give this one another name (--record), or write over that one (--replace)")


class Unfinished:
    """Beside the record that an evaluation will write: `unfinished/<its name>.jsonl`, and `.json` with what is asked.

    `asked` says which model is asked what, and how, by name. RunFolderError where a journal of something else lies
    there: it names what differs.
    """

    def __init__(self, record: Path, asked: Mapping[str, Any]) -> None:
        place = record.parent / "unfinished" / record.stem
        self.journal, self._asked = Journal(f"{place}.jsonl"), Path(f"{place}.json")
        there = json.loads(self._asked.read_text(encoding="utf-8")) if self._asked.exists() else {}
        if self.journal.path.exists() and there != asked:
            raise RunFolderError(
                f"{self.journal.path}: holds answers of an evaluation that was not finished, and was another; "
                f"it differs in\n{_differences(there, asked)}"
                f"give this one another name (--record), set these as they are there, or delete {self.journal.path}"
            )
        remove_torn_writes(record.parent, record.name)
        remove_torn_writes(place.parent, self._asked.name)
        write_atomic(self._asked, json.dumps(asked, indent=1) + "\n")

    def clear(self) -> None:
        """The record is written: forget the answers, and then what they answer."""
        self.journal.clear()
        self._asked.unlink()


def _differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    keys = [key for key in dict.fromkeys([*there, *asked]) if there.get(key) != asked.get(key)]
    return "".join(f"  {key}: there {there.get(key)}, here {asked.get(key)}\n" for key in keys)
