"""Reads rows from JSON, JSON lines, parquet, a saved `datasets` folder or the hub, each with the
place it came from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from megatron_efr.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet")

_UNPACK = "unpack it, and name what was in it"
_SAVE = "save it as UTF-8"
_KINDS = {
    b"\x1f\x8b": ("gzip", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("zstandard", _UNPACK),
    b"BZh": ("bzip2", _UNPACK),
    b"\xfd7zXZ": ("xz", _UNPACK),
    b"PK\x03\x04": ("a zip archive", _UNPACK),
    b"PAR1": ("parquet", "rename it to .parquet"),
    b"ARROW1": ("an Arrow table", "convert it to .parquet"),
    b"\xff\xfe": ("UTF-16", _SAVE),
    b"\xfe\xff": ("UTF-16", _SAVE),
    b"version https://git-lfs": ("a git-lfs pointer", "fetch the file itself: git lfs pull"),
    b"<!DOCTYPE": ("a web page", "download the file itself"),
    b"<html": ("a web page", "download the file itself"),
}
"""First bytes of files that are none of ours, what each then is, and what to do."""


class DatasetError(UserError, ValueError):
    """A data set that cannot be used. The message names the file and line, what is wrong, and what
    would be right.
    """


class Row(NamedTuple):
    """One record. `number` counts from 1; its place is "file:line", or "source:row N" of a
    table.
    """

    number: int
    where: str
    columns: dict[str, Any]


def read_rows(path: str, split: str = "train", limit: int | None = None) -> list[Row]:
    """The first `limit` rows of `path` (all when None); DatasetError when there are none or one
    cannot be read.

    A path that ends in .jsonl, .json or .parquet, starts like a path (`/`, `./`, `../`, `~`) or
    lies in a folder that exists is never looked up on the hub.
    """
    try:
        rows = list(islice(_rows(path, split), limit))
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not rows:
        raise DatasetError(f"{path}: holds no rows")
    return rows


def _rows(path: str, split: str) -> Iterator[Row]:
    place = Path(path).expanduser()
    if place.is_dir():
        return _saved_rows(path, place, split)
    if place.is_file():
        if place.suffix not in SUFFIXES:
            raise DatasetError(
                f"{path}: cannot tell its kind by its name; expected one of {', '.join(SUFFIXES)}"
            )
        with place.open("rb") as file:
            _refuse_other_kinds(path, file.read(64))
        if place.suffix == ".parquet":
            return _parquet_rows(path, place)
        text = _text(path, place.read_bytes())
        return _json_lines(path, text) if place.suffix == ".jsonl" else _json_rows(path, text)
    if is_local(path):
        raise DatasetError(f"{path}: no such file or folder")
    return _hub_rows(path, split)


def is_local(path: str) -> bool:
    """True if `path` is on this machine or nowhere: the hub is not asked for it."""
    place = Path(path).expanduser()
    return (
        place.exists()
        or place.suffix in SUFFIXES
        or path.startswith(("/", "./", "../", "~"))
        or ("/" in path and place.parent.is_dir())
        or path.count("/") > 1
    )


def _text(path: str, data: bytes) -> str:
    """A JSON file's bytes as text, whatever its line ends; DatasetError for what is no text."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"0x{data[error.start]:02x}"
        raise DatasetError(
            f"{path}:{line}: cannot be read: not UTF-8 (the byte {byte}); save it as UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _refuse_other_kinds(path: str, data: bytes) -> None:
    """DatasetError for a file whose first bytes are another kind's than its name's."""
    for start, (kind, advice) in _KINDS.items():
        if data.startswith(start) and not (kind == "parquet" and path.endswith(".parquet")):
            raise DatasetError(f"{path}: cannot be read: its content is {kind}; {advice}")


def _json_lines(path: str, text: str) -> Iterator[Row]:
    number = 0
    for line, record in enumerate(text.split("\n"), start=1):
        if record.strip():
            number += 1
            yield Row(number, f"{path}:{line}", _record(f"{path}:{line}", record))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; DatasetError for a key that stands in it twice: which value counts is
    anybody's guess.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DatasetError(f"the key {twice!r} occurs twice in one object; leave one of them")
    return made


def _record(where: str, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text, object_pairs_hook=_once)
    except DatasetError as error:
        raise DatasetError(f"{where}: {error}") from error
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{where}: not valid JSON: {error.msg} at column {error.colno}"
        ) from error
    # a number of thousands of digits, brackets a thousand deep
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{where}: not JSON that can be read: {error}") from error
    return _checked(where, record, text)


def _checked(where: str, record: Any, text: str) -> dict[str, Any]:
    """A row: an object of whole characters."""
    if not isinstance(record, dict):
        raise DatasetError(
            f"{where}: expected an object with a question and an answer, found "
            f"{type(record).__name__}"
        )
    # an escape may be half a character, which no tokenizer takes and no file holds
    if "\\u" in text:
        try:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise DatasetError(
                f"{where}: {half} is half a character (a lone surrogate); write the whole one"
            ) from error
    return record


def _json_rows(path: str, text: str) -> Iterator[Row]:
    """An array of objects, or JSON lines under a .json name, as hub files often are."""
    # without a bracket these are JSON lines
    position = _skip(text, 0)
    if not text.startswith("[", position):
        yield from _json_lines(path, text)
        return
    # line breaks are counted from `counted` on, so that a long file is counted once
    decoder = json.JSONDecoder(object_pairs_hook=_once)
    number = 0
    line = 1
    counted = 0
    position = _skip(text, position + 1)
    # object by object, so that an error names its line
    while not text.startswith("]", position):
        line = line + text.count("\n", counted, position)
        counted = position
        where = f"{path}:{line}"
        try:
            record, position = decoder.raw_decode(text, position)
        except DatasetError as error:
            raise DatasetError(f"{where}: {error}") from error
        except json.JSONDecodeError as error:
            raise DatasetError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{where}: not JSON that can be read: {error}") from error
        # a comma, or the end
        number += 1
        yield Row(number, where, _checked(where, record, text[counted:position]))
        position = _skip(text, position)
        if text.startswith(",", position):
            position = _skip(text, position + 1)
        elif not text.startswith("]", position):
            raise DatasetError(f"{where}: not valid JSON: expected ',' or ']' after this object")
    # nothing may follow the array
    if (rest := _skip(text, position + 1)) < len(text):
        line += text.count("\n", counted, rest)
        raise DatasetError(
            f"{path}:{line}: not valid JSON: {text[rest : rest + 20]!r} after the array's end"
        )


def _skip(text: str, position: int) -> int:
    """The position of the next character that is no white space."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _parquet_rows(path: str, place: Path) -> Iterator[Row]:
    import pyarrow  # comes with datasets
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(place)
        records = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DatasetError(f"{path}: cannot be read as parquet: {error}") from error
    return _table_rows(path, records, _json_columns(table.schema))


def _json_columns(schema: Any) -> list[str]:
    """Columns of datasets' type Json, which parquet holds as text that quotes a text."""
    declared = (
        json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        .get("info", {})
        .get("features", {})
    )
    return [
        field.name
        for field in schema
        if getattr(field.type, "extension_name", "") == "arrow.json"
        or (
            isinstance(feature := declared.get(field.name), dict) and feature.get("_type") == "Json"
        )
    ]


def _saved_rows(path: str, place: Path, split: str) -> Iterator[Row]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(place))
    except FileNotFoundError as error:
        raise DatasetError(
            f"{path}: a folder, but not one that datasets' save_to_disk wrote: {error}"
        ) from error
    except Exception as error:  # whatever a damaged file leads the library into
        raise DatasetError(
            f"{path}: a folder of save_to_disk that is damaged: {_said(error)}"
        ) from error
    # a dict of splits, or one split alone
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DatasetError(
                f"{path}: has no split {split!r}; it has {', '.join(map(str, saved))}"
            )
        saved = saved[split]
    # values are decoded one by one, and only then does a damaged one show
    rows = _table_rows(path, saved)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # of decoding: a missing library, a damaged value
            raise DatasetError(
                f"{path}: a row of this folder cannot be read: {_said(error)}"
            ) from error
        if row is None:
            return
        yield row


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _hub_rows(path: str, split: str) -> Iterator[Row]:
    import datasets

    try:
        table = datasets.load_dataset(path, split=split)
    except Exception as error:  # the library raises its own, the hub client's, and the network's
        raise DatasetError(
            f"{path}: no such file, and loading split {split!r} of a hub data set of that name "
            f"failed: {error}"
        ) from error
    return _table_rows(f"{path}[{split}]", table)


def _table_rows(path: str, table: Any, json_columns: Sequence[str] = ()) -> Iterator[Row]:
    for number, record in enumerate(table, start=1):
        where = f"{path}:row {number}"
        columns = dict(record)
        for name in json_columns:
            columns[name] = _json_value(where, name, columns[name])
        yield Row(number, where, columns)


def _json_value(where: str, name: str, text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{where}: column {name!r} is of type Json and holds no JSON: {error.msg}"
        ) from error
