"""The command line that every program shares: a configuration file, overrides, and errors that a
person can read.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TypeVar

from megatron_efr import log
from megatron_efr.config import ConfigError, RunConfig
from megatron_efr.config.file import load
from megatron_efr.durable import reason
from megatron_efr.errors import UserError
from megatron_efr.parent import end_with_parent, is_rank

ConfigT = TypeVar("ConfigT", bound=RunConfig)
NumberT = TypeVar("NumberT", int, float)

EXIT_USER_ERROR = 2
PORTS = (1, 65535)
PATIENCE_S = 20.0  # for the rank that says what is wrong: torchrun ends the others after it
_PEER_ENDED = ("closed by peer", "reset by peer")  # gloo's errors begin with a file and a line
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def parser(program: str, description: str, *, resumes: bool = False) -> argparse.ArgumentParser:
    """A program's parser, with the configuration file, the overrides and, if it `resumes`, that
    flag.

    Overrides may stand after flags: parse with `parse_intermixed_args`.
    """
    made = argparse.ArgumentParser(prog=f"efr {program}", description=description)
    made.add_argument("config", help="YAML file; see examples/")
    made.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values that replace the file's"
    )
    if resumes:
        made.add_argument(
            "--resume", action="store_true", help="go on from the run folder's newest checkpoint"
        )
    made.add_argument(
        "--log-level",
        choices=log.LEVELS,
        help="least level that the terminal shows (default: EFR_LOG_LEVEL, or info)",
    )
    return made


def within(kind: type[NumberT], least: float, most: float = math.inf) -> Callable[[str], NumberT]:
    """A flag's type for argparse: an int or a float from `least` to `most`. It refuses others and
    names the flag.
    """

    def read(text: str) -> NumberT:
        value = kind(text)
        if not least <= value <= most or value == math.inf:
            limits = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"{text}: {limits}")
        return value

    read.__name__ = kind.__name__  # argparse says "invalid int value"
    return read


@contextlib.contextmanager
def configured(kind: type[ConfigT], arguments: argparse.Namespace) -> Iterator[ConfigT]:
    """The configuration that the arguments name, checked; a ConfigError within the block says which
    file it is of.
    """
    log.to_terminal(arguments.log_level)
    config = load(kind, arguments.config, arguments.overrides)
    with named(arguments.config):
        yield config


@contextlib.contextmanager
def named(file: str) -> Iterator[None]:
    """Put the file's name before every line of a ConfigError that does not begin with it."""
    try:
        yield
    except ConfigError as error:
        lines = [
            line if line.startswith(f"{file}:") else f"{file}: {line}"
            for line in str(error).splitlines()
        ]
        raise ConfigError("\n".join(lines)) from error


def world_size() -> int:
    """Number of ranks that torchrun started; 1 without it. Known before they join."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def run(program: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> None:
    """Run a program to its exit code, without a traceback for what is no fault of the program's.

    A UserError is one sentence, printed by rank 0: 2. Ctrl-C: 130, and pressed again it ends at
    once. A pipe that nobody reads any more, such as `| head`: 141. (The last two as shells have it:
    128 + signal.)
    """
    end_with_parent()
    threading.excepthook = _thread_ended
    with _interruptible():
        code = _ended(program, argv)
    if code:
        sys.exit(code)


def _ended(
    program: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None
) -> int | str | None:
    """The program's exit code."""
    try:
        try:
            log.to_terminal()
            program(argv)
        finally:
            if sys.stdout is not None:  # it has no handler if the program was started without one
                sys.stdout.flush()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            _say(f"error: {error}")
        else:  # torchrun ends all when the first one has ended, and rank 0 is to say why
            time.sleep(PATIENCE_S)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        if not is_rank():  # their launcher says it
            _say("interrupted")
        return 128 + signal.SIGINT
    except RuntimeError as error:
        # a collective that waited for a rank that has ended
        if not (is_rank() and any(words in str(error) for words in _PEER_ENDED)):
            raise
        time.sleep(PATIENCE_S)
        _say(f"rank {os.environ['RANK']}: another rank has ended, for the reason that it gave")
        return 1
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_unread():
            return 128 + signal.SIGPIPE
        # a full or read-only disk is the user's to mend; any other fault keeps its traceback
        if error.errno not in _OF_THE_DISK:
            raise
        _say(f"error: {error.filename or 'output'}: {reason(error.filename or os.curdir, error)}")
        return EXIT_USER_ERROR
    except SystemExit as end:
        return end.code
    return 0


def _thread_ended(ended: threading.ExceptHookArgs) -> None:
    """Say in one line what a full disk did to a library's thread: who waits for it hears of it
    too.
    """
    if isinstance(ended.exc_value, OSError) and ended.exc_value.errno in _OF_THE_DISK:
        _say(f"{ended.thread.name if ended.thread else 'a thread'}: {ended.exc_value}")
    else:
        threading.__excepthook__(ended)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # it may be the terminal that has gone
        print(line, file=sys.stderr, flush=True)


def _is_unread() -> bool:
    """True if standard output is a pipe that nobody reads; what is still to be written then goes
    nowhere.
    """
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)  # 0: errors and hang-ups alone
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt once, while the program tidies up; a second one ends the
    process.
    """
    before = signal.getsignal(signal.SIGINT)
    if (
        before is not signal.default_int_handler
        or threading.current_thread() is not threading.main_thread()
    ):
        yield  # ignored, as under nohup, or somebody else's
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
