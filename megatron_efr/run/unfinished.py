"""An evaluation that is not finished: its journal of answered problems, and what they are the answers to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_efr.durable import remove_torn_writes, write_atomic
from megatron_efr.run.folder import Journal, RunFolderError


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
            raise RunFolderError(_differences(self.journal.path, there, asked))
        remove_torn_writes(record.parent, record.name)
        remove_torn_writes(place.parent, self._asked.name)
        write_atomic(self._asked, json.dumps(asked, indent=1) + "\n")

    def clear(self) -> None:
        """The record is written: forget the answers, and then what they answer."""
        self.journal.clear()
        self._asked.unlink()


def _differences(path: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    keys = [key for key in dict.fromkeys([*there, *asked]) if there.get(key) != asked.get(key)]
    return (
        f"{path}: holds answers of an evaluation that was not finished, and was another than this; it differs in\n"
        + "".join(f"  {key}: there {there.get(key)}, here {asked.get(key)}\n" for key in keys)
        + f"give this one another name (--record), set these as they are there, or delete {path}"
    )
