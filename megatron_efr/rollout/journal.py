"""The journal: finished groups on disk, a line each, so that a process that was killed need not generate them again."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megatron_efr.durable import GOES_ON, write_whole, writing
from megatron_efr.errors import UserError
from megatron_efr.rollout.group_json import decode_group, encode_group
from megatron_efr.types import Group


class JournalError(UserError):
    """A journal that is damaged. The message says where, and what would be right."""


class JournalContents(NamedTuple):
    """What a journal holds: the finished groups, in the order they finished, and how many torn last lines (0, 1)."""

    groups: list[Group]
    torn: int


class Journal:
    """Finished groups that an iteration may take, one JSON line each, so that they are not generated again.

    Every line is flushed to the operating system: it outlives a killed process. With `fsync` it outlives the machine
    too, at the price of one disk sync per group. One writer at a time.
    """

    def __init__(self, path: str | Path, fsync: bool = False) -> None:
        self.path = Path(path)
        self.fsync = fsync
        self._file: BinaryIO | None = None

    def append(self, group: Group) -> None:
        """Add one finished group. A torn line left by a crash is cut off first. UnwritableError leaves it out whole."""
        with writing(self.path, GOES_ON):
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._cut_torn_line()
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (held open over appends)
            write_whole(self._file, checked_line(encode_group(group)))
            if self.fsync:
                os.fsync(self._file.fileno())

    def read(self) -> JournalContents:
        """The finished groups. JournalError where a line other than the last is damaged: that is no torn write."""
        if not self.path.exists():
            return JournalContents([], 0)
        *whole, rest = self.path.read_bytes().split(b"\n")
        groups: list[Group] = []
        for number, line in enumerate(whole, start=1):
            try:
                groups.append(decode_group(_checked(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise JournalError(
                    f"{self.path}:{number}: not a finished group ({error}); the file is damaged beyond a torn last "
                    f"line. Delete it to generate these responses again"
                ) from error
        return JournalContents(groups, int(bool(rest)))

    def clear(self) -> None:
        """Forget everything: the iteration is over."""
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Stop writing; a later `append` opens the file again."""
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
    """A journal's line: the text behind its CRC-32."""
    data = text.encode("utf-8")
    return f"{zlib.crc32(data):08x} ".encode("ascii") + data + b"\n"


def _checked(line: bytes) -> bytes:
    """The text of a line of `checked_line`; ValueError where it is not what was written. One without is from before."""
    if line.startswith(b"{"):
        return line
    checksum, _, data = line.partition(b" ")
    if checksum != f"{zlib.crc32(data):08x}".encode("ascii"):
        raise ValueError("its checksum differs")
    return data
