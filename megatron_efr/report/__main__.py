"""`efr report`: the table and the HTML page of a run folder, of a family, or of a family over
several seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_efr import arguments
from megatron_efr.report.agreement import agreement_markdown, compare
from megatron_efr.report.records import over_seeds, summary_markdown
from megatron_efr.report.results import runs_of
from megatron_efr.report.run_page import write_run_page
from megatron_efr.report.stored import read_summary
from megatron_efr.run.folder import RunFolder
from megatron_efr.types import UserError


def report(path: Path, seeds: bool, against: Path | None = None) -> str:
    """Write the page; return what to print: the family's table, or it beside another's, and where
    the page lies.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder")
    folder = RunFolder(path)
    if seeds:
        gather_seeds(folder)
    if not (folder.config.is_file() or folder.summary.is_file() or folder.evaluations.is_dir()):
        raise UserError(
            f"{path}: no run's folder: none of config.yaml, summary.json and eval/ is there"
        )
    summary: dict[str, Any] = (
        read_summary(folder.summary) if folder.summary.exists() else {"models": []}
    )
    page = write_run_page(folder, _members(folder, summary))
    shown = summary_markdown(summary) if summary["models"] else ""
    if against is not None:
        shown = agreement_markdown(
            compare(_family(folder), _family(RunFolder(against))), path.name, against.name
        )
    return f"{shown}\n\nreport: {page}"


def _family(folder: RunFolder) -> dict[str, Any]:
    """The summary of a family."""
    if not folder.summary.exists():
        raise UserError(f"{folder.summary}: not there; it is written at the end of `efr sweep`")
    return read_summary(folder.summary)


def _members(folder: RunFolder, summary: dict[str, Any]) -> list[RunFolder]:
    """The runs behind a family's models, in the first seed's folder if there are several."""
    seeds = _seeds(folder) if summary.get("seeds") else []
    first = seeds[0] if seeds else folder.path
    runs = [RunFolder(first / name) for model in summary["models"] for name in runs_of(model)]
    return [run for run in runs if run.config.exists()]


def _seeds(folder: RunFolder) -> list[Path]:
    """The folders of a family over several seeds, `seed-2` before `seed-10`."""
    found = [path.parent for path in folder.path.glob("seed-*/summary.json")]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def gather_seeds(folder: RunFolder) -> None:
    """Put the summaries and the evaluations of `seed-*/` together; the first seed's keep their
    names.
    """
    seeds = _seeds(folder)
    if not seeds:
        raise UserError(
            f"{folder.path}: no seed-*/summary.json; run `efr sweep` with name=.../seed-1 and so "
            "on first"
        )
    summaries = [read_summary(seed / "summary.json") for seed in seeds]
    said = {key: summaries[0][key] for key in ("note", "against") if key in summaries[0]}
    merged = over_seeds(summaries)
    for model in merged["models"]:
        model["runs"] = []
    names: dict[tuple[str, str, str], str] = {}
    for seed, summary in zip(seeds, summaries, strict=True):
        ending = "" if seed == seeds[0] else f".{seed.name}"
        for model, own in zip(merged["models"], summary["models"], strict=True):
            model["runs"] += [f"{run}{ending}" for run in runs_of(own)]
        for run, record in RunFolder(seed).read_evaluations().items():
            folder.write_evaluation(f"{run}{ending}", _renamed(record, seed.name, names))
    folder.write_summary(merged | said)


def _renamed(
    record: dict[str, Any], seed: str, names: dict[tuple[str, str, str], str]
) -> dict[str, Any]:
    """The record with another name for each problem whose own already stands for another problem.

    Seeds may share their held-out problems, or each have a task of its own. `names` has those given
    so far, by own name, question and reference answer; it gets those that are new.
    """
    given, rows = set(names.values()), []
    for row in record["rows"]:
        own = row["id"]
        name = names.setdefault(
            (own, row["question"], row["gold"]), f"{seed}/{own}" if own in given else own
        )
        rows.append(row | {"id": name})
    return record | {"rows": rows}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `efr report`."""
    parser = argparse.ArgumentParser(
        prog="efr report", description="The table and the HTML page of a run folder."
    )
    parser.add_argument("folder", type=Path, help="runs/NAME: a run or a family")
    parser.add_argument(
        "--seeds",
        action="store_true",
        help="the folder holds one family per seed, in seed-1, seed-2 ...",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FOLDER",
        help="compare a family's figures with this one's",
    )
    given = parser.parse_args(argv)
    print(report(given.folder, given.seeds, given.against))


if __name__ == "__main__":
    arguments.run(main)
