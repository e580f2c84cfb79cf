"""Files and lines that are written whole or not at all, and the sentence if a disk is full."""

from __future__ import annotations

import contextlib
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megatron_efr.errors import UserError


class UnwritableError(UserError):
    """A file or folder that cannot be written: it names the path, the reason and what remains."""


GOES_ON = (
    "what was written before is whole, and the same command goes on from it (a run with --resume)"
)


@contextlib.contextmanager
def writing(path: str | Path, remains: str = "what was there before is whole") -> Iterator[None]:
    """Let an OSError of this block, which writes `path`, end the program with a sentence:
    UnwritableError. Of a folder it names the file that was refused.
    """
    try:
        yield
    except OSError as error:
        refused = error.filename
        if isinstance(refused, str) and Path(refused).is_relative_to(path):
            path = refused
        raise UnwritableError(
            f"{path}: cannot be written: {reason(path, error)}; {remains}"
        ) from error


def reason(path: str | Path, error: Exception) -> str:
    """The sentence why `path` cannot be written, and how much room there is."""
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    place = standing(Path(path).parent)
    try:
        return f"{why}; {shutil.disk_usage(place).free:,} bytes are free at {place}"
    except OSError:  # the file system is gone
        return f"{why}; {place} is not readable either"


def standing(folder: Path) -> Path:
    """`folder`, or the nearest above it that is there."""
    return next(
        (place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir()),
        Path("/"),
    )


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Replace `path` by `content` (text as UTF-8): after a crash it holds the old content or the
    new, never a part.

    Parent folders are made. UnwritableError if the disk does not take it.
    """
    with writing(path):
        replace_file(path, content)


def replace_file(path: str | Path, content: str | bytes) -> None:
    """Like `write_atomic`, with the file system's own OSError.

    The temporary file lies in the same folder (a rename is atomic only within a file system); the
    file is synced before the rename and the folder after it.
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
        # gone if it was renamed; a read-only disk keeps what it has
        with contextlib.suppress(OSError):
            temporary.unlink()
    sync_folder(path.parent)


@contextlib.contextmanager
def whole_folder(destination: Path) -> Iterator[Path]:
    """Yield an empty folder, beside `destination`, which it becomes when the block ends: complete
    or absent.

    A folder that is there is replaced. UnwritableError if the disk does not take it; whatever
    fails, nothing is left.
    """
    partial, old = (destination.with_name(destination.name + end) for end in (".partial", ".old"))
    with writing(destination):
        # one that was killed between its two moves left the whole folder under the other name
        if old.exists() and not destination.exists():
            os.replace(old, destination)
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            # the folder that is there stays whole until the new one stands in its place
            if destination.exists():
                os.replace(destination, old)
            try:
                os.replace(partial, destination)
            except OSError:
                if old.exists():
                    os.replace(old, destination)
                raise
            sync_folder(destination.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # gone if it was moved


def sync_folder(folder: Path) -> None:
    """Let a rename within `folder` outlive the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, line: bytes) -> None:
    """Add a line to a file and hand it to the operating system, whole or not at all;
    UnwritableError.

    After a kill the last line may be torn: its newline is missing.
    """
    with writing(path, GOES_ON):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            write_whole(file, line + b"\n")


def write_whole(file: BinaryIO, data: bytes) -> None:
    """Write at the end of a file without a buffer; if the disk takes a part of it, take that back.
    OSError.
    """
    before = file.seek(0, os.SEEK_END)
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(before)
        raise


def remove_torn_writes(folder: Path, files: str = "*") -> None:
    """Remove what killed writes of these `files`, a pattern, left in `folder`. Their owner alone
    calls it.
    """
    with writing(folder):
        for left in folder.glob(f".{files}.*.tmp"):
            left.unlink(missing_ok=True)


class Lines(NamedTuple):
    """Read such a file: the whole lines' texts, and the number of torn last lines (0, 1)."""

    texts: list[bytes]
    torn: int


class LineFile:
    """A file of lines of text, each behind its CRC-32.

    Every line is flushed to the operating system: it outlives a killed process. One writer at a
    time.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: BinaryIO | None = None

    def add(self, text: str) -> None:
        """Add one line. A torn line left by a crash is cut off first. UnwritableError leaves it out
        whole.
        """
        with writing(self.path, GOES_ON):
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._cut_torn_line()
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (held open over appends)
            write_whole(self._file, checked_line(text))

    def lines(self) -> Lines:
        """The file as it stands, checksums included: `checked` gives a line's text. Empty if there
        is no file.
        """
        if not self.path.exists():
            return Lines([], 0)
        *whole, rest = self.path.read_bytes().split(b"\n")
        return Lines(whole, int(bool(rest)))

    def clear(self) -> None:
        """Forget everything: what the lines say is kept elsewhere."""
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Stop writing; a later `add` opens the file again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _cut_torn_line(self) -> None:
        """A line is whole when its newline is there; what follows the last newline was torn."""
        if self.path.exists():
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(self.path, whole)


def checked_line(text: str) -> bytes:
    """A line: the text behind its CRC-32."""
    data = text.encode("utf-8")
    return f"{zlib.crc32(data):08x} ".encode("ascii") + data + b"\n"


def checked(line: bytes) -> bytes:
    """The text of a line of `checked_line`; ValueError if it is not what was written. One without
    is from before.
    """
    if line.startswith(b"{"):
        return line
    checksum, _, data = line.partition(b" ")
    if checksum != f"{zlib.crc32(data):08x}".encode("ascii"):
        raise ValueError("its checksum differs")
    return data
