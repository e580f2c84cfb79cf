"""A family's table: a row for each model, with the keys that vary and its final figures, as Parquet
and CSV.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet

from megatron_efr.durable import write_atomic

Row = Mapping[str, Any]


def write_table(rows: Sequence[Row], folder: Path) -> Path:
    """Write table.parquet and table.csv to `folder`; returns the latter's path. A row lacks what it
    has no value of.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: _column([row.get(name) for row in rows]) for name in names})
    for name, write in (("table.parquet", parquet.write_table), ("table.csv", csv.write_csv)):
        sink = pa.BufferOutputStream()
        write(table, sink)
        write_atomic(folder / name, sink.getvalue().to_pybytes())
    return folder / "table.csv"


def figures(record: Mapping[str, Any]) -> dict[str, float | None]:
    """Every measure of an evaluation's record by its name, and the ends of its interval as NAME_low
    and NAME_high.

    Those of a data set, if there are several, stand behind its name, as in `aime24.accuracy`.
    """
    parts = {"": record}
    if len(record["datasets"]) > 1:
        parts |= {f"{name}.": part for name, part in record["datasets"].items()}
    found: dict[str, float | None] = {}
    for prefix, part in parts.items():
        found |= {f"{prefix}problems": part["problems"], f"{prefix}samples": part["samples"]}
        for name, measure in _measures(part).items():
            found[f"{prefix}{name}"] = measure["value"]
            for end in ("low", "high"):
                if measure[end] is not None:
                    found[f"{prefix}{name}_{end}"] = measure[end]
    return found


def _measures(part: Mapping[str, Any]) -> dict[str, Any]:
    """Measures by name; of a record that an older version wrote, accuracy and tokens."""
    if "measures" in part:
        return part["measures"]
    return {
        key: {"value": part[key], "low": part[f"{key}_ci"][0], "high": part[f"{key}_ci"][1]}
        for key in ("accuracy", "tokens")
    }


def _column(values: Sequence[Any]) -> pa.Array:
    """Values of one type: whole numbers, numbers or booleans if all of them are; else texts, JSON
    for the others.
    """
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) == 1 and kinds <= {bool, int, float, str}:
        return pa.array(values)
    if kinds <= {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array(
        [
            value if value is None or isinstance(value, str) else json.dumps(value)
            for value in values
        ]
    )
