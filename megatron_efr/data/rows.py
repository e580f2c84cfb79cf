"""Reads rows from JSON, JSON lines, parquet, a saved `datasets` folder or the hub, each with the place it came from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from megatron_efr.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet")


class DatasetError(UserError, ValueError):
    """A data set that cannot be used. The message names the file and line, what is wrong, and what would be right."""


class Row(NamedTuple):
    """One record: `number` counts from 1, `where` is "file:line" (for tables without lines "source:row N")."""

    number: int
    where: str
    columns: dict[str, Any]


def read_rows(path: str, split: str = "train", limit: int | None = None) -> list[Row]:
    """The first `limit` rows of `path` (all when None); DatasetError when there are none or one cannot be read.

    A path that ends in .jsonl, .json or .parquet, starts like a path (`/`, `./`, `../`, `~`) or lies in a folder that
    exists is never looked up on the hub.
    """
    try:
        rows = list(islice(_rows(path, split), limit))
    except DatasetError:
        raise
    except ValueError as error:  # bytes that are no UTF-8, a parquet file that is none
        raise DatasetError(f"{path}: cannot be read: {error}") from error
    if not rows:
        raise DatasetError(f"{path}: holds no rows")
    return rows


def _rows(path: str, split: str) -> Iterator[Row]:
    place = Path(path).expanduser()
    if place.is_dir():
        return _saved_rows(path, place, split)
    if place.is_file():
        if place.suffix == ".jsonl":
            return _json_lines(path, place.read_text(encoding="utf-8"))
        if place.suffix == ".json":
            return _json_rows(path, place.read_text(encoding="utf-8"))
        if place.suffix == ".parquet":
            return _parquet_rows(path, place)
        raise DatasetError(f"{path}: cannot tell its kind by its name; expected one of {', '.join(SUFFIXES)}")
    local = path.startswith(("/", "./", "../", "~")) or ("/" in path and place.parent.is_dir()) or path.count("/") > 1
    if local or place.suffix in SUFFIXES:
        raise DatasetError(f"{path}: no such file or folder")
    return _hub_rows(path, split)


def _json_lines(path: str, text: str) -> Iterator[Row]:
    number = 0
    for line, record in enumerate(text.split("\n"), start=1):
        if record.strip():
            number += 1
            yield Row(number, f"{path}:{line}", _record(f"{path}:{line}", record))


def _record(where: str, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(record, dict):
        raise DatasetError(f"{where}: expected an object with a question and an answer, found {type(record).__name__}")
    return record


def _json_rows(path: str, text: str) -> Iterator[Row]:
    """An array of objects, or JSON lines under a .json name, as hub files often are."""
    position = _skip(text, 0)
    if not text.startswith("[", position):
        yield from _json_lines(path, text)
        return
    decoder, number, line, counted = json.JSONDecoder(), 0, 1, 0
    position = _skip(text, position + 1)
    while not text.startswith("]", position):
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}"
        try:
            record, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DatasetError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
        if not isinstance(record, dict):
            raise DatasetError(f"{where}: expected an object, found {type(record).__name__}")
        number += 1
        yield Row(number, where, record)
        position = _skip(text, position)
        if text.startswith(",", position):
            position = _skip(text, position + 1)
        elif not text.startswith("]", position):
            raise DatasetError(f"{where}: not valid JSON: expected ',' or ']' after this object")


def _skip(text: str, position: int) -> int:
    """The position of the next character that is no white space."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _parquet_rows(path: str, place: Path) -> Iterator[Row]:
    import pyarrow.parquet  # comes with datasets

    return _table_rows(path, pyarrow.parquet.read_table(place).to_pylist())


def _saved_rows(path: str, place: Path, split: str) -> Iterator[Row]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(place))
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: a folder, but not one that datasets' save_to_disk wrote: {error}") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DatasetError(f"{path}: has no split {split!r}; it has {', '.join(map(str, saved))}")
        saved = saved[split]
    return _table_rows(path, saved)


def _hub_rows(path: str, split: str) -> Iterator[Row]:
    import datasets

    try:
        table = datasets.load_dataset(path, split=split)
    except Exception as error:  # the library raises its own, the hub client's, and the network's
        raise DatasetError(
            f"{path}: no such file, and loading split {split!r} of a hub data set of that name failed: {error}"
        ) from error
    return _table_rows(f"{path}[{split}]", table)


def _table_rows(path: str, table: Any) -> Iterator[Row]:
    for number, record in enumerate(table, start=1):
        yield Row(number, f"{path}:row {number}", dict(record))
