"""A GGUF file: its metadata and tensors, checked before any is used, and weights dequantised a few
rows at a time.
"""

from __future__ import annotations

import importlib
import math
import os
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from megatron_efr.errors import UserError

# What is read, of llama.cpp's types; the files called Q4_K_M hold Q5 and Q8 too, if a row does not
# divide by 256.
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_VERSIONS = (2, 3)
_CHUNK = 2**22  # numbers of a tensor that are dequantised at once


@dataclass(frozen=True, slots=True)
class Stored:
    """The place of a tensor in the file; `shape` is PyTorch's, the slowest dimension first."""

    kind: str
    shape: tuple[int, ...]
    start: int
    row_bytes: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])


class GGUFFile:
    """The header of a GGUF file (ggml's docs/gguf.md), read whole: `metadata` by key, `tensors` by
    name.

    UserError names the key or tensor at which the file ends too early, or whose type is not read.
    The package `gguf` knows the types of tensors; the header is read here, since its reader keeps
    an object for each token (500 MB and 10 s for 150,000 of them) and does not say which tensor a
    mistake is in.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.tensors: dict[str, Stored] = {}
        self.metadata: dict[str, Any] = {}
        package()
        try:
            with self.path.open("rb") as file:
                self._read(_Header(self.path, file))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error

    def _read(self, header: _Header) -> None:
        if header.take(4, "its first bytes") != b"GGUF":
            raise UserError(f"{self.path}: not a GGUF file: it does not begin with GGUF")
        version = header.number("I", "the version")
        if version not in _VERSIONS:
            raise UserError(
                f"{self.path}: GGUF of version {version}; supported: 2 and 3, little-endian"
            )
        tensors, keys = (
            header.number("Q", "the number of tensors"),
            header.number("Q", "the number of keys"),
        )
        for _ in range(keys):
            key = header.string("the metadata")
            self.metadata[key] = header.value(header.number("I", key), key)
        infos = [header.tensor() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise UserError(
                f"{self.path}: general.alignment: a number of bytes is required, found "
                f"{alignment!r}"
            )
        data = -(-header.position // alignment) * alignment
        for name, shape, kind, offset in infos:
            self.tensors[name] = self._stored(name, shape, kind, data + offset)

    def _stored(self, name: str, shape: tuple[int, ...], number: int, start: int) -> Stored:
        sizes = {
            kind.value: (kind.name, *size) for kind, size in package().GGML_QUANT_SIZES.items()
        }
        kind, block, block_bytes = sizes.get(number, (f"number {number}", 1, 1))
        if kind not in KINDS:
            raise UserError(
                f"{self.path}: {name} is quantised as {kind}; supported: {', '.join(KINDS)}"
            )
        if not shape or shape[-1] % block:
            raise UserError(
                f"{self.path}: {name} is {list(shape)}: rows of {kind} are a multiple of {block} "
                "long"
            )
        stored = Stored(kind, shape, start, shape[-1] // block * block_bytes)
        end = start + stored.rows * stored.row_bytes
        if end > self.path.stat().st_size:
            raise UserError(
                f"{self.path}: the file is cut off: {name} ends at byte {end:,}, and it has "
                f"{self.path.stat().st_size:,}; fetch it again"
            )
        return stored

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor in `dtype` and its own shape, dequantised in float32 by parts of 4 M numbers.

        UserError for numbers that are not finite.
        """
        stored = self.tensors[name]
        gguf = package()
        kind = gguf.GGMLQuantizationType[stored.kind]
        out = torch.empty(stored.shape, dtype=dtype)
        rows = out.view(stored.rows, -1)
        step = max(1, _CHUNK // stored.shape[-1])
        with self.path.open("rb", buffering=0) as file:
            file.seek(stored.start)
            for part in rows.split(step):
                raw = np.fromfile(file, np.uint8, len(part) * stored.row_bytes).reshape(
                    len(part), -1
                )
                part.copy_(torch.from_numpy(gguf.quants.dequantize(raw, kind)))
                if not part.isfinite().all():
                    raise UserError(
                        f"{self.path}: {name} holds numbers that are not finite; fetch the file "
                        "again"
                    )
        return out


class _Header:
    """A cursor over the header; every length is checked against what the file still has."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size

    @property
    def position(self) -> int:
        return self._file.tell()

    def take(self, count: int, what: str) -> bytes:
        if count > self._size - self.position:  # a damaged length must not have the whole file read
            raise UserError(
                f"{self._path}: the file is cut off: it ends within {what}; fetch it again"
            )
        return self._file.read(count)

    def number(self, letter: str, what: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}"), what))[0]

    def string(self, what: str) -> str:
        taken = self.take(self.number("Q", what), what)
        try:
            return taken.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self._path}: {what} holds a text that is not UTF-8: {error}"
            ) from error

    def value(self, kind: int, key: str) -> Any:
        """One value of the metadata; a float32 as the shortest decimal that is read back as the
        same float32.
        """
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            element, count = self.number("I", key), self.number("Q", key)
            if element == _ARRAY:
                raise UserError(f"{self._path}: {key} is an array of arrays, which no model has")
            return [self.value(element, key) for _ in range(count)]
        if kind not in _SCALARS:
            raise UserError(f"{self._path}: {key} is of the unknown type {kind}")
        found = self.number(_SCALARS[kind], key)
        return float(str(np.float32(found))) if kind == _FLOAT32 else found

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type, and offset of a tensor."""
        name = self.string("the table of tensors")
        dimensions = range(self.number("I", name))
        shape = tuple(self.number("Q", name) for _ in dimensions)[::-1]
        return name, shape, self.number("I", name), self.number("Q", name)


@cache
def package() -> Any:
    """The package `gguf`; UserError if it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise UserError(
            "GGUF files are read with the package gguf: pip install 'megatron-efr[gguf]'"
        ) from error
