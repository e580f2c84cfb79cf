"""A family's table: a row for each model, with the keys that vary and its final figures, as Parquet and CSV."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet

from megatron_efr.config.sweep import leaves
from megatron_efr.durable import write_atomic

Row = Mapping[str, Any]

_NOT_FIGURES = ("rows", "left_out", "asked", "script", "name")  # of an evaluation's record


def write_table(rows: Sequence[Row], folder: Path) -> Path:
    """Write table.parquet and table.csv to `folder`; returns the latter's path. A row lacks what it has no value of."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: _column([row.get(name) for row in rows]) for name in names})
    for name, write in (("table.parquet", parquet.write_table), ("table.csv", csv.write_csv)):
        sink = pa.BufferOutputStream()
        write(table, sink)
        write_atomic(folder / name, sink.getvalue().to_pybytes())
    return folder / "table.csv"


def figures(record: Mapping[str, Any]) -> dict[str, float | None]:
    """Every figure of an evaluation's record by its dotted name; of an interval `_ci` the ends `_low` and `_high`."""
    found: dict[str, float | None] = {}
    kept = {key: value for key, value in record.items() if key not in _NOT_FIGURES}
    if len(kept.get("datasets", ())) < 2:  # its figures are those of all problems
        kept.pop("datasets", None)
    for key, value in leaves("", kept):
        if key.endswith("_ci") and value is not None:
            found[f"{key[:-3]}_low"], found[f"{key[:-3]}_high"] = value
        elif value is None or isinstance(value, int | float):
            found[key] = value
    return found


def _column(values: Sequence[Any]) -> pa.Array:
    """Values of one type: whole numbers, numbers or booleans where all of them are; else texts, JSON for the others."""
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) == 1 and kinds <= {bool, int, float, str}:
        return pa.array(values)
    if kinds <= {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array([value if value is None or isinstance(value, str) else json.dumps(value) for value in values])
