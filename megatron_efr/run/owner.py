"""One owner of a run folder or an evaluation: a lock that says host and process, and is free when
that has ended.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import yaml

from megatron_efr import log
from megatron_efr.durable import writing
from megatron_efr.errors import UserError
from megatron_efr.run.changes import Completed
from megatron_efr.run.folder import RunFolder

WAIT_S = 2.0  # a killed process may take a moment to end


class OwnedError(UserError):
    """Another process works there. The message names it."""


@contextmanager
def owned(lock: Path, what: str) -> Iterator[None]:
    """Own `what`, whose lock file is `lock`, within the block; OwnedError names the process that
    does already.

    The lock is flock(2)'s: the kernel frees it when its process ends, however it ends, on every
    host that shares the file system. What the file says is for people, and for file systems that
    have no locks: see `_check_alive`.
    """
    file = _locked(lock, what)
    try:
        with writing(lock):
            file.truncate(0)
            file.write(json.dumps(_me()).encode("utf-8"))
        yield
    finally:
        with suppress(OSError):
            lock.unlink()  # still locked: who opened it before finds another file at its name
        file.close()


@contextmanager
def claimed(
    folder: RunFolder, resolved_yaml: str, resume: bool, completed: Completed = yaml.safe_dump
) -> Iterator[None]:
    """Own a run's folder, and claim it for its configuration, as `RunFolder.claim` has it, within
    the block.

    Its log is kept there meanwhile.
    """
    with owned(folder.lock, str(folder.path)):
        folder.claim(resolved_yaml, resume, completed)
        with log.kept(folder.log):
            if not resume:
                log.event("start", f"{folder.path}: {' '.join(sys.argv)}")
            yield


def is_owned(lock: Path) -> bool:
    """True if a process owns what `lock` is the lock file of; on a file system without locks, if
    the file is there.
    """
    try:
        with open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        return lock.exists()
    return False


def _locked(lock: Path, what: str) -> BinaryIO:
    """The open lock file, locked."""
    limit = time.monotonic() + WAIT_S
    while True:
        with writing(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = open(lock, "a+b", buffering=0)  # noqa: SIM115 (held open by the owner)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(file)
            file.close()
            if time.monotonic() > limit:
                raise OwnedError(_sentence(what, owner)) from None
            time.sleep(0.1)
            continue
        except OSError:  # a file system without locks
            _check_alive(lock, what, _owner(file))
            return file
        if _is_at(file, lock):
            _say_left_behind(what, _owner(file))
            return file
        file.close()  # its owner removed it as we opened it


def _is_at(file: BinaryIO, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(lock))
    except FileNotFoundError:
        return False


def _me() -> dict[str, Any]:
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "pid": process.pid,
        "began": process.create_time(),
        "command": " ".join(sys.argv),
    }


def _owner(file: BinaryIO) -> dict[str, Any]:
    """Text of the lock file; empty if it says nothing yet."""
    file.seek(0)
    try:
        found = json.loads(file.read())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _check_alive(lock: Path, what: str, owner: dict[str, Any]) -> None:
    """Check without a lock: OwnedError if the named process lives, or is on another host."""
    if not owner:
        return
    if owner["host"] != socket.gethostname():
        raise OwnedError(
            f"{_sentence(what, owner)}\nthis file system has no locks, and this host cannot see "
            f"whether that process is still there; if it is not, delete {lock}"
        )
    with suppress(psutil.NoSuchProcess):
        if psutil.Process(owner["pid"]).create_time() == owner["began"]:
            raise OwnedError(_sentence(what, owner))


def _say_left_behind(what: str, owner: dict[str, Any]) -> None:
    if owner and owner.get("host") != socket.gethostname():
        log.warning(
            f"{what}: taken over from {_named(owner)}, which has ended without giving it up"
        )


def _named(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    since = datetime.fromtimestamp(owner["began"]).strftime("%Y-%m-%d %H:%M:%S")
    return f"process {owner['pid']} on host {owner['host']} ({owner['command']}, since {since})"


def _sentence(what: str, owner: dict[str, Any]) -> str:
    return (
        f"{what}: is being worked on by {_named(owner)}, and two would write over each other; "
        "wait for it, end it, or choose another name"
    )
