"""Finds a model folder's safetensors and what their headers say, or says in a sentence what is
wrong with the files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from megatron_efr.config import ConfigError
from megatron_efr.config.json_object import read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class Stored:
    """The place of a tensor, with the type and shape that its file's header says."""

    file: Path
    dtype: str  # safetensors' name of it: F32, BF16, I8, F8_E4M3, ...
    shape: tuple[int, ...]


def locate(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder by name; ConfigError for a file that is missing, damaged or
    contradicts another.

    A tensor that two shards hold is the one that the index names; one that it leaves out counts, as
    in transformers.
    """
    index = _read_index(folder)
    stored: dict[str, Stored] = {}
    for file in sorted(set(index.values())) or [_single(folder)]:
        stored |= {
            name: entry for name, entry in _header(file).items() if index.get(name, file) == file
        }
    if astray := [name for name in index if name not in stored]:
        raise ConfigError(
            f"model.path: {folder / INDEX} says that {index[astray[0]].name} holds {astray[0]}, "
            f"which it does not; {len(astray)} of {len(index)} tensors are misplaced: index and "
            "shards do not belong together"
        )
    return stored


def _read_index(folder: Path) -> dict[str, Path]:
    """Shard of each tensor, by the index; empty if there is no index."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    index = read_object(path).get("weight_map")
    if (
        not isinstance(index, dict)
        or not index
        or not all(isinstance(file, str) for file in index.values())
    ):
        raise ConfigError(
            f"model.path: {path}: weight_map: an object of tensors and their files is required"
        )
    files = {name: folder / file for name, file in index.items()}
    named = sorted({file.name for file in files.values()})
    if (folder / SINGLE).is_file() and named != [SINGLE]:
        raise ConfigError(
            f"model.path: {folder} holds {SINGLE}, and beside it {INDEX}, which names "
            f"{some(named)}: one of them is left over, and programs differ in which they read; "
            "remove it"
        )
    if absent := sorted({str(file) for file in files.values() if not file.is_file()}):
        raise ConfigError(f"model.path: {path} names files that are not there: {some(absent)}")
    return files


def _single(folder: Path) -> Path:
    path = folder / SINGLE
    if not path.is_file():
        others = sorted(
            file.name for file in folder.iterdir() if file.suffix in (".bin", ".pth", ".gguf")
        )
        there = f" ({some(others)} is there: convert it to safetensors)" if others else ""
        raise ConfigError(
            f"model.path: {folder}: neither {SINGLE} nor {INDEX} found{there}; "
            f"set model.init: random to start from fresh weights"
        )
    return path


def _header(file: Path) -> dict[str, Stored]:
    try:
        # a pointer or nothing, as a clone without its large files leaves it
        with file.open("rb") as opened:
            beginning = opened.read(len(_POINTER))
        if beginning == _POINTER:
            raise ConfigError(
                f"model.path: {file} is a git-lfs pointer, not the weights; fetch them: git lfs "
                "pull"
            )
        if not beginning:
            raise ConfigError(f"model.path: {file} is empty; fetch it again")
        # names, types and shapes stand in the header: no tensor is read
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            return {
                name: Stored(file, part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except SafetensorError as error:
        # the size tells a download that was cut off
        size = file.stat().st_size
        raise ConfigError(
            f"model.path: {file} is no safetensors file, or was cut off or damaged ({size:,} "
            f"bytes: {error}); fetch it again"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"model.path: {file}: cannot be read: {error.strerror or error}"
        ) from error


def some(names: list[str]) -> str:
    """The first five of `names`, and how many more there are."""
    return (
        ", ".join(names[:5]) + ((f" and {len(names) - 5} more") if len(names) > 5 else "")
    ) or "none"
