"""The log: what a line holds, what the terminal and what the file shows, and how a run's end is
told.
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_efr import arguments, log
from megatron_efr.errors import UserError
from megatron_efr.run.folder import RunFolder
from megatron_efr.run.owner import claimed

pytestmark = pytest.mark.alike


@pytest.fixture(autouse=True)
def level(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(log.VARIABLE, "info")
    yield
    monkeypatch.undo()
    log.to_terminal()


def told(path: Path) -> list[tuple[str, str, str]]:
    return [(line.level, line.event, line.text) for line in log.read(path)]


def test_a_line_has_time_rank_and_level(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log.info("one")
    monkeypatch.setenv("RANK", "3")
    log.event("lost", "engine-0")
    log.warning("slow")
    first, second, third = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d rank 0 INFO one", first)
    assert second.endswith(" rank 3 INFO [lost] engine-0")
    assert third.endswith(" rank 3 WARNING [warned] slow")


def test_the_terminal_has_its_level_and_the_file_every_event(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log.to_terminal("warning")
    with log.kept(tmp_path / "log.txt"):
        log.LOG.debug("detail")
        log.info("plain")
        log.event("published", "version 1", logging.DEBUG)
        log.warning("a\nb")
    shown = capsys.readouterr().err
    assert "[warned] a\nb" in shown
    assert "plain" not in shown
    assert "[end]" not in shown
    assert told(tmp_path / "log.txt") == [
        ("INFO", "", "plain"),
        ("DEBUG", "published", "version 1"),
        ("WARNING", "warned", "a\nb"),
        ("INFO", "end", "finished"),
    ]
    log.info("afterwards")
    assert len(told(tmp_path / "log.txt")) == 4
    log.to_terminal("debug")
    with log.kept(tmp_path / "log.txt"):
        log.LOG.debug("detail")
    assert ("DEBUG", "", "detail") in told(tmp_path / "log.txt")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("no such file"), ("ERROR", "end", "with an error: no such file")),
        (KeyboardInterrupt(), ("WARNING", "end", "interrupted")),
        (SystemExit(75), ("INFO", "end", "with exit code 75")),
    ],
)
def test_the_file_says_how_a_run_ended(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    line: tuple[str, str, str],
) -> None:
    with pytest.raises(type(error)), log.kept(tmp_path / "log.txt"):
        raise error
    assert told(tmp_path / "log.txt") == [line]
    assert capsys.readouterr().err == ""


def test_the_file_says_what_ended_if_it_is_not_the_run(tmp_path: Path) -> None:
    with log.kept(tmp_path / "log.txt", "evaluation base"):
        pass
    assert told(tmp_path / "log.txt") == [("INFO", "end", "evaluation base: finished")]


def test_a_fault_is_in_the_file_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), log.kept(tmp_path / "log.txt"):
        print(1 // 0)
    [(_, event, text)] = told(tmp_path / "log.txt")
    assert event == "end"
    assert text.startswith("with a fault: ZeroDivisionError")
    assert "Traceback (most recent call last):\n" in text


HALF = """
import sys
from pathlib import Path
from megatron_efr import log
log.to_terminal()
with log.kept(Path(sys.argv[1])):
    log.event("lost", "a name of other bytes: \\udcff")
"""


def test_what_no_file_takes_as_text_is_written_as_an_escape(tmp_path: Path) -> None:
    """In a process of its own: pytest's workers cannot send what pytest keeps of such a line."""
    subprocess.run(
        [sys.executable, "-c", HALF, str(tmp_path / "log.txt")], check=True, capture_output=True
    )
    assert told(tmp_path / "log.txt")[0] == ("INFO", "lost", "a name of other bytes: \\udcff")


def test_a_disk_that_takes_no_line_is_named_once_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.txt").mkdir()
    with log.kept(tmp_path / "log.txt"):
        log.info("one")
        log.info("two")
    assert capsys.readouterr().err.count("log.txt: cannot be written: Is a directory") == 1


def test_a_run_that_claims_its_folder_logs_its_start_there_and_one_that_is_refused_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["efr", "train", "a.yaml"])
    folder = RunFolder(tmp_path)
    with claimed(folder, "a: 1", False):
        folder.append_metrics(1, {"accuracy": 0.5})
    before = folder.log.read_bytes()
    with pytest.raises(UserError, match="pass --resume"), claimed(folder, "a: 1", False):
        raise AssertionError
    assert folder.log.read_bytes() == before
    with claimed(folder, "a: 1", True):
        folder.go_on_from(1, 2)
    assert [line.event for line in log.read(folder.log)] == ["start", "end", "resume", "end"]
    assert log.read(folder.log)[0].text == f"{tmp_path}: efr train a.yaml"


def test_the_level_is_a_flag_of_programs_and_their_own_programs_inherit_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments.parser("train", "").parse_intermixed_args(["a.yaml", "--log-level", "error"])
    log.to_terminal(given.log_level)
    log.warning("not shown")
    log.to_terminal()
    log.warning("not shown")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(log.VARIABLE, "loud")
    with pytest.raises(
        UserError, match="EFR_LOG_LEVEL: 'loud' is no level of a log; there are: debug, info"
    ):
        log.to_terminal()
