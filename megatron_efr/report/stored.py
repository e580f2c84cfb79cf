"""Reads summaries back; a file that is damaged, or another program's, is named with its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from megatron_efr.evaluation.stored import Interval, Part, read_tree


class Model(Part):
    name: str
    alpha: float | None
    accuracy: float
    tokens: float
    accuracy_ci: Interval | None = None
    tokens_ci: Interval | None = None
    tokens_by_difficulty: dict[str, float]
    label: str = ""
    base: str = ""
    runs: list[str] = Field(default_factory=list[str])
    problems: int = 0
    left_out: dict[str, int] = Field(default_factory=dict[str, int])
    accuracy_by_seed: list[float] = Field(default_factory=list[float])
    tokens_by_seed: list[float] = Field(default_factory=list[float])
    accuracy_sd: float | None = None
    tokens_sd: float | None = None


class Summary(Part):
    models: list[Model]
    seconds: dict[str, float | None]
    seeds: int = 0
    note: str = ""
    against: str = ""


def read_summary(path: Path) -> dict[str, Any]:
    """A family's summary.json; UserError if the file holds no such thing."""
    return read_tree(
        path,
        Summary,
        "family's summary",
        "move it out of this folder; `efr sweep` writes it at its end",
    )
