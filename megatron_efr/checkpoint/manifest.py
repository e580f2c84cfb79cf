"""A folder's manifest: size and SHA-256 of every file, so that what is read is what was written.
Needs no Megatron.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from megatron_efr.durable import replace_file
from megatron_efr.errors import UserError

MANIFEST = "manifest.json"
STATE = "state.json"  # the run's own state, in every checkpoint
LATEST = "latest"  # beside a run's checkpoints: the name of the newest that verified

_MODEL = ("path", "sha256")  # of the model that a checkpoint began with


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read; the message names it and what is wrong."""


def verify(path: Path) -> None:
    """Compare every file's size and checksum with the manifest; CheckpointError names the first
    that differs.
    """
    for file, (size, checksum) in entries(path).items():
        try:
            _verify_file(path / file, size, checksum)
        except OSError as error:
            raise CheckpointError(f"{path / file}: not readable: {error}") from error


def entries(path: Path) -> dict[str, tuple[int, str]]:
    """(bytes, SHA-256) of every file by name, as the manifest has them; CheckpointError if there is
    none.
    """
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{path}: no {MANIFEST}: the save was interrupted")
    try:
        listed = json.loads(manifest.read_text(encoding="utf-8"))
        return {file: (entry["bytes"], entry["sha256"]) for file, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{manifest}: not readable: {error}") from error


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's own state: its step and the model that it began with; CheckpointError if it is
    damaged.
    """
    try:
        state = json.loads((path / STATE).read_bytes())
        if not isinstance(state["step"], int) or not all(
            isinstance(state["initial_model"][k], str) for k in _MODEL
        ):
            raise TypeError("no step, or no initial model")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path / STATE}: damaged: {type(error).__name__}: {error}"
        ) from error
    return state


def write_manifest(folder: Path) -> None:
    """Sync every file of `folder` to the disk and write the manifest beside them."""
    listed = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        listed[str(path.relative_to(folder))] = {
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
        }
    replace_file(folder / MANIFEST, json.dumps(listed, indent=1))


def _verify_file(member: Path, size: int, checksum: str) -> None:
    if not member.is_file():
        raise CheckpointError(f"{member}: missing")
    if member.stat().st_size != size:
        raise CheckpointError(f"{member}: {member.stat().st_size} bytes, {size} were written")
    if _sha256(member) != checksum:
        raise CheckpointError(f"{member}: its content is not what was written (SHA-256 differs)")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
