"""Files that are written whole or not at all, and the sentence where a disk does not take them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_efr.errors import UserError


class UnwritableError(UserError):
    """A file or folder that cannot be written: it names the path, the reason and what remains."""


GOES_ON = "what was written before is whole, and the same command goes on from it (a run with --resume)"


@contextlib.contextmanager
def writing(path: str | Path, remains: str = "what was there before is whole") -> Iterator[None]:
    """Let an OSError of this block, which writes `path`, end the program with a sentence: UnwritableError."""
    try:
        yield
    except OSError as error:
        raise UnwritableError(f"{path}: cannot be written: {reason(path, error)}; {remains}") from error


def reason(path: str | Path, error: Exception) -> str:
    """Why `path` cannot be written, and how much room there is."""
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    place = standing(Path(path).parent)
    try:
        return f"{why}; {shutil.disk_usage(place).free:,} bytes are free at {place}"
    except OSError:  # the file system is gone
        return f"{why}; {place} is not readable either"


def standing(folder: Path) -> Path:
    """`folder`, or the nearest above it that is there."""
    return next((place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir()), Path("/"))


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Replace `path` by `content` (text as UTF-8): after a crash it holds the old content or the new, never a part.

    Parent folders are made. UnwritableError where the disk does not take it.
    """
    with writing(path):
        replace_file(path, content)


def replace_file(path: str | Path, content: str | bytes) -> None:
    """Like `write_atomic`, with the file system's own OSError.

    The temporary file lies in the same folder (a rename is atomic only within a file system); the file is synced
    before the rename and the folder after it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # gone where it was renamed; a read-only disk keeps what it has
            temporary.unlink()
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Let a rename within `folder` outlive the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, line: bytes) -> None:
    """Add a line to a file and hand it to the operating system, whole or not at all; UnwritableError.

    After a kill the last line may be torn: its newline is missing.
    """
    with writing(path, GOES_ON):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            write_whole(file, line + b"\n")


def write_whole(file: BinaryIO, data: bytes) -> None:
    """Write at the end of a file without a buffer; where the disk takes a part of it, take that back. OSError."""
    before, rest = file.seek(0, os.SEEK_END), memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(before)
        raise


def remove_torn_writes(folder: Path, files: str = "*") -> None:
    """Remove what killed writes of these `files`, a pattern, left in `folder`. Their owner alone calls it."""
    with writing(folder):
        for left in folder.glob(f".{files}.*.tmp"):
            left.unlink(missing_ok=True)
