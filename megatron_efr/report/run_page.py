"""The page of a run folder: a family with its members, or a single run, from what lies in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from megatron_efr.durable import writing
from megatron_efr.report.page import write_report
from megatron_efr.report.records import build_summary
from megatron_efr.report.stored import read_summary

_PACKAGES = ("megatron-efr", "megatron-core", "torch", "transformers", "math-verify", "numpy")


class Folder(Protocol):
    """The part of a run folder that a report reads."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> Path: ...

    @property
    def report(self) -> Path: ...

    @property
    def summary(self) -> Path: ...

    def read_evaluations(self) -> dict[str, dict[str, Any]]: ...

    def read_metrics(self) -> list[dict[str, Any]]: ...


def write_run_page(folder: Folder, members: Sequence[Folder] = ()) -> Path:
    """Write report/index.html and its pictures; returns the page's path. `members` are a family's
    runs.
    """
    evaluations = folder.read_evaluations()
    summary = _summary(folder, evaluations)
    runs = {run.path.name: run for run in (members or [folder]) if run.config.exists()}
    metrics = {name: run.read_metrics() for name, run in runs.items()}
    configs = {
        name: run.config.read_text(encoding="utf-8", errors="replace") for name, run in runs.items()
    }
    with writing(folder.report):
        return write_report(
            summary,
            evaluations,
            metrics,
            folder.report,
            title=folder.path.name,
            note=summary.get("note", ""),
            configs=configs,
            versions=dict(_versions()),
        )


def _summary(folder: Folder, evaluations: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The family's summary.json; for a single run, its newest evaluation."""
    if folder.summary.exists():
        return read_summary(folder.summary)
    if not evaluations:
        return {"models": [], "seconds": {}}
    newest = max(evaluations)
    return build_summary({newest: evaluations[newest]}, {newest: None}, {})


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:  # run from a checkout that was never installed
            continue
