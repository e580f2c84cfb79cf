"""A log of what befalls a run: time, rank and level of every line, on the terminal and in
`runs/NAME/log.txt`.

`event` names what operators count. Its line has the name in brackets, so that `grep -c '\\[lost\\]'
log.txt` counts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_efr.errors import UserError

Level = Literal["debug", "info", "warning", "error"]
LEVELS: tuple[Level, ...] = ("debug", "info", "warning", "error")

EventName = Literal["start", "resume", "end", "lost", "back", "published", "saved", "warned"]
"""The events: a run that begins, goes on or ends; an engine that is lost or serves again; weights
that were published; a checkpoint that verified; a warning.
"""

VARIABLE = "EFR_LOG_LEVEL"
"""The terminal's level in the environment, which the programs that a program starts inherit."""

LOG = logging.getLogger("megatron_efr")
_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) rank (\d+) ([A-Z]+) (?:\[(\w+)\] )?(.*)")


class Line(NamedTuple):
    """One record of a log file. `event` is empty for a line that is none; `text` may have several
    lines.
    """

    time: datetime
    rank: int
    level: str
    event: str
    text: str


def event(name: EventName, text: str, level: int = logging.INFO) -> None:
    """Log an event. Its `level` decides if the terminal shows it; the file of the run holds every
    one.
    """
    LOG.log(level, "[%s] %s", name, text, extra={"event": name})


def info(text: str) -> None:
    """Log a line that is no event."""
    LOG.info("%s", text)


def warning(text: str) -> None:
    """Log what may be wrong and stops nothing, as the event `warned`."""
    event("warned", text, logging.WARNING)


def to_terminal(level: Level | None = None) -> None:
    """Write records from `level` on to standard error: by default the environment's, else `info`.
    Call it again to change the level.
    """
    if level is not None:
        os.environ[VARIABLE] = level
    name = os.environ.get(VARIABLE, "info")
    if name not in LEVELS:
        raise UserError(
            f"{VARIABLE}: {name!r} is no level of a log; there are: {', '.join(LEVELS)}"
        )
    LOG.setLevel(logging.DEBUG)
    LOG.propagate = False  # libraries give the root logger handlers of their own
    if not any(isinstance(handler, _Terminal) for handler in LOG.handlers):
        LOG.addHandler(_Terminal())
    for handler in LOG.handlers:
        if isinstance(handler, _Terminal):
            handler.setLevel(name.upper())


@contextlib.contextmanager
def kept(path: Path, work: str = "") -> Iterator[None]:
    """Add the records of this block to the file `path`, and how it ended: rank 0's, whose folder it
    is.

    `work` names what is done in the block, if it is not the run itself. The file has every event,
    and all else from `info` on, or from the terminal's level on if that is lower.
    """
    handler = _File(path)
    of = f"{work}: " if work else ""
    LOG.addHandler(handler)
    # the last line says how the work ended
    try:
        yield
    except UserError as error:
        _end(f"{of}with an error: {error}", logging.ERROR)
        raise
    except KeyboardInterrupt:
        # asked to end, which is no fault
        _end(f"{of}interrupted", logging.WARNING)
        raise
    except SystemExit as end:
        _end(f"{of}with exit code {end.code}", logging.INFO)
        raise
    except BaseException as error:
        # a fault of ours: the file keeps its traceback, which the terminal may have lost
        LOG.critical(
            "[end] %swith a fault: %r",
            of,
            error,
            exc_info=True,
            extra={"event": "end", "printed": True},
        )
        raise
    else:
        _end(f"{of}finished", logging.INFO)
    finally:
        LOG.removeHandler(handler)
        handler.close()


def read(path: Path) -> list[Line]:
    """The records of a log file, in order; none if it is not there. A line of another form belongs
    to the one above.
    """
    lines: list[Line] = []
    if not path.exists():
        return lines
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if found := _LINE.fullmatch(line):
            when, rank, level, name, text = found.groups()
            lines.append(Line(datetime.fromisoformat(when), int(rank), level, name or "", text))
        elif lines:
            lines[-1] = lines[-1]._replace(text=f"{lines[-1].text}\n{line}")
    return lines


def _end(how: str, level: int) -> None:
    """Log the end of a run to its file; the program says it on the terminal."""
    LOG.log(level, "[end] %s", how, extra={"event": "end", "printed": True})


class _Formatter(logging.Formatter):
    """`TIME rank R LEVEL text`."""

    def format(self, record: logging.LogRecord) -> str:
        record.__dict__["rank"] = os.environ.get("RANK", "0")
        return super().format(record)


class _Terminal(logging.Handler):
    """Standard error as it is when a record comes: a progress bar may stand in for it. What was
    printed is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(
            _Formatter("%(asctime)s rank %(rank)s %(levelname)s %(message)s", "%H:%M:%S")
        )
        self.addFilter(lambda record: not getattr(record, "printed", False))

    def emit(self, record: logging.LogRecord) -> None:
        # the terminal may have gone, or there never was one
        with contextlib.suppress(OSError, AttributeError):
            print(self.format(record), file=sys.stderr, flush=True)


class _File(logging.Handler):
    """A file to which each record is added in one write; a disk that does not take it is named
    once.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._failed = False
        self.setFormatter(
            _Formatter("%(asctime)s rank %(rank)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
        )
        self.addFilter(self._takes)

    def _takes(self, record: logging.LogRecord) -> bool:
        shown = min(
            [
                logging.INFO,
                *(handler.level for handler in LOG.handlers if isinstance(handler, _Terminal)),
            ]
        )
        return hasattr(record, "event") or record.levelno >= shown

    def emit(self, record: logging.LogRecord) -> None:
        if self._failed:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "ab", buffering=0) as file:
                file.write(f"{self.format(record)}\n".encode(errors="backslashreplace"))
        except OSError as error:
            self._failed = True
            warning(
                f"{self._path}: cannot be written: {error.strerror}; the run goes on without it"
            )


def duration(seconds: float) -> str:
    """`7s`, `1m07s`, `2h05m`: at most six characters up to a hundred hours."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
