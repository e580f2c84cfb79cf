"""The page of a run folder: a family with its members, or a single run, from what lies in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from megatron_efr.report.page import write_report

_PACKAGES = ("megatron-efr", "megatron-core", "torch", "transformers", "math-verify", "numpy")


class Folder(Protocol):
    """The part of a run folder that a report reads."""

    @property
    def path(self) -> Path: ...

    @property
    def report(self) -> Path: ...

    @property
    def summary(self) -> Path: ...

    def read_evaluations(self) -> dict[str, dict[str, Any]]: ...


def write_run_page(folder: Folder) -> Path:
    """Write report/index.html and its pictures; returns the page's path."""
    summary: dict[str, Any] = {"models": [], "seconds": {}}
    if folder.summary.exists():
        summary = json.loads(folder.summary.read_text(encoding="utf-8"))
    runs = dict(_runs(folder.path))
    return write_report(
        summary,
        folder.read_evaluations(),
        {name: _lines(path / "metrics.jsonl") for name, path in runs.items()},
        folder.report,
        title=folder.path.name,
        note=summary.get("note", ""),
        configs={name: (path / "config.yaml").read_text(encoding="utf-8") for name, path in runs.items()},
        versions=dict(_versions()),
    )


def _runs(path: Path) -> Iterator[tuple[str, Path]]:
    """The run itself, or the members of a family, by name."""
    for candidate in [path, *sorted(path.iterdir())]:
        if (candidate / "metrics.jsonl").exists() and (candidate / "config.yaml").exists():
            yield candidate.name, candidate


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:  # run from a checkout that was never installed
            continue
