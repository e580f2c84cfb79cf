"""One owner of a folder: who comes second is told who works there; a process that was killed owns
nothing any more.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_efr.durable import UnwritableError
from megatron_efr.run import owner
from megatron_efr.run.folder import RunFolder, RunFolderError
from megatron_efr.run.owner import OwnedError, claimed, owned

HOLDS = """
import sys, time
from pathlib import Path
from megatron_efr.run.owner import owned
with owned(Path(sys.argv[1]), "the run"):
    print("owned", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holding(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which owns `tmp_path`/.lock."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path / ".lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "owned\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "WAIT_S", 0.3)


def test_the_second_is_refused_with_host_process_and_command_of_the_first(
    tmp_path: Path, holding: subprocess.Popen[str]
) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(OwnedError) as refused, claimed(folder, "name: another\n", resume=False):
        raise AssertionError("two own one folder")
    said = str(refused.value)
    assert (
        f"{tmp_path}: is being worked on by process {holding.pid} on host {socket.gethostname()} "
        "(-c "
    ) in said
    assert not folder.config.exists()


def test_a_lock_whose_process_was_killed_is_free_at_once(
    tmp_path: Path, holding: subprocess.Popen[str]
) -> None:
    os.kill(holding.pid, signal.SIGKILL)
    holding.wait()
    assert (tmp_path / ".lock").exists()
    with owned(tmp_path / ".lock", "the run"):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir()), "a folder that nobody works in has no lock"


def test_within_one_process_too_and_free_after_the_block_whatever_ends_it(tmp_path: Path) -> None:
    lock = tmp_path / "new" / ".lock"
    for _ in range(2):
        with (
            pytest.raises(OwnedError, match=f"process {os.getpid()} on"),
            owned(lock, "x"),
            owned(lock, "x"),
        ):
            raise AssertionError
    folder = RunFolder(tmp_path / "run")
    folder.append_metrics(1, {})
    with pytest.raises(RunFolderError, match=r"no config\.yaml"), claimed(folder, "a: 1", False):
        raise AssertionError
    assert not folder.lock.exists()


def test_an_owner_on_another_host_whose_lock_is_free_has_ended_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / ".lock"
    lock.write_text(
        json.dumps({"host": "node7", "pid": 12, "began": 1e9, "command": "efr train a.yaml"})
    )
    with owned(lock, "runs/a"):
        said = capsys.readouterr().err
    assert (
        "runs/a: taken over from process 12 on host node7 (efr train a.yaml, since 2001-09-"
    ) in said


def mine() -> dict[str, object]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "began": psutil.Process().create_time(),
        "command": "x",
    }


@pytest.mark.parametrize(
    ("owner_is", "refused"),
    [
        (lambda: mine(), "is being worked on by process"),
        (lambda: mine() | {"began": 1.0}, None),  # its id was given to another process
        (lambda: mine() | {"pid": 2**22 + 1}, None),
        (
            lambda: mine() | {"host": "node7"},
            "this host cannot see whether that process is still there",
        ),
    ],
)
def test_on_a_file_system_without_locks_the_process_is_looked_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner_is: Callable[[], dict[str, object]],
    refused: str | None,
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps(owner_is()))
    if refused is None:
        with owned(lock, "x"):
            assert json.loads(lock.read_text())["pid"] == os.getpid()
        assert not lock.exists()
    else:
        with pytest.raises(OwnedError, match=refused), owned(lock, "x"):
            raise AssertionError
        assert lock.exists()


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UnwritableError, match=r"file/run/\.lock: cannot be written: Not a directory; [\d,]+ bytes"
    ):
        with owned(tmp_path / "file/run/.lock", "x"):
            raise AssertionError
