"""Comparisons of a benchmark, as a table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison; `ours` and `theirs` in `unit`. `ratio` is ours over theirs, of an iteration
    theirs over ours.
    """

    name: str
    unit: str
    ours: float
    theirs: float | None
    ratio: float | None
    goal: str
    lengths: str
    our_memory_mib: float | None = None
    their_memory_mib: float | None = None
    note: str = ""


def phases(answers: Iterable[dict[str, Any]]) -> str:
    """Our iteration's seconds by phase, as medians."""
    kept = [answer["phases"] for answer in answers]
    return "ours: " + ", ".join(
        f"{name} {statistics.median(p[name] for p in kept):.2f} s" for name in kept[0]
    )


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| one thread | mean response tokens (ours / theirs) | ours | theirs | ratio | goal | "
        "peak memory, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        theirs = "not measured" if row.theirs is None else figure(row.theirs, row.unit)
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        both = [f"{m:,.0f}" for m in (row.our_memory_mib, row.their_memory_mib) if m is not None]
        cells = (
            row.name,
            row.lengths,
            figure(row.ours, row.unit),
            theirs,
            ratio,
            row.goal,
            " / ".join(both),
        )
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"{row.name}: {row.note}" for row in rows if row.note]
    return "\n".join([*lines, "", *notes]).rstrip()


def figure(value: float, unit: str) -> str:
    return f"{value:,.2f} {unit}" if unit == "s" else f"{value:,.0f} {unit}"
