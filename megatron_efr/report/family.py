"""A sweep's report of its models: the table, summary.json and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron_efr.report.records import Listed, Record, family_summary
from megatron_efr.report.run_page import Folder, write_run_page
from megatron_efr.report.table import figures, write_table


class FamilyFolder(Folder, Protocol):
    """The part of a family's folder that is read and written here."""

    def write_summary(self, summary: Mapping[str, Any]) -> None: ...


class Evaluated(NamedTuple):
    """One evaluated run of a family, or a base; runs of one `model` differ in their seed alone."""

    name: str  # of its evaluation's record
    model: str
    label: str
    base: str
    keys: Mapping[str, Any]  # what varies, by dotted key
    path: str  # of its weights

    @property
    def alpha(self) -> float | None:
        """The alpha of a family that varies it."""
        return self.keys.get("method.alpha")


def write_family(
    folder: FamilyFolder,
    runs: Sequence[Evaluated],
    members: Sequence[Folder],
    seconds: Mapping[str, float],
    note: str = "",
    against: str | None = None,
) -> tuple[Path, Path]:
    """Write table.parquet, table.csv, summary.json and the report; returns the paths of table and
    page.

    `members` are the folders of the runs that were trained; `seconds` says how long each part took;
    `against` is the model that the others are compared with, the first one by default.
    """
    records = folder.read_evaluations()
    keys = {key: None for run in runs for key in run.keys}
    table = write_table([_row(run, keys, records[run.name]) for run in runs], folder.path)
    said = {"note": note} if against is None else {"note": note, "against": against}
    folder.write_summary({**family_summary(records, _listed(runs), seconds), **said})
    return table, write_run_page(folder, members)


def _row(run: Evaluated, keys: Mapping[str, None], record: Record) -> dict[str, Any]:
    return {
        "model": run.name,
        **keys,
        **run.keys,
        **figures(record),
        "base": run.base,
        "path": run.path,
    }


def _listed(runs: Sequence[Evaluated]) -> list[Listed]:
    models: dict[str, list[Evaluated]] = {}
    for run in runs:
        models.setdefault(run.model, []).append(run)
    return [
        Listed(name, same[0].label, tuple(run.name for run in same), same[0].base, same[0].alpha)
        for name, same in models.items()
    ]
