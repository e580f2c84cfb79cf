"""`efr watch`: curves dot by dot, and what the view says of a run that works, has ended or was
killed.
"""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path

import pytest
from rich.console import Console

from megatron_efr import log
from megatron_efr.errors import UserError
from megatron_efr.log import Line
from megatron_efr.observe.curves import Curve, draw
from megatron_efr.observe.dashboard import Watched, seconds_left, state, view
from megatron_efr.run.folder import RunFolder
from megatron_efr.run.owner import claimed
from megatron_efr.watch import read, watch

pytestmark = pytest.mark.alike

NOW = datetime(2026, 1, 2, 3, 4, 5)


def step(number: int) -> dict[str, float | None]:
    """A step of ten seconds: accuracy rises by 5 points, tokens of right answers fall, wrong ones
    are missing at 1.
    """
    figures: dict[str, float | None] = {
        "reward_mean": 0.1 * number,
        "accuracy": 0.4 + 0.05 * number,
    }
    figures |= {"tokens_mean": 100.0 - number, "tokens_correct": 90.0 - number, "entropy": 0.5}
    figures |= {"tokens_wrong": None if number == 1 else 120.0, "kl": 0.001 * number}
    figures |= {
        "engine/serving": 3.0,
        "engine/lost": float(number == 2),
        "engine/back": float(number == 3),
    }
    return figures | {
        "time/total": 10.0,
        "time/rollout": 6.5,
        "time/train": 3.0,
        "time/tokens_per_s": 1234.0,
    }


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A stored run: four of ten steps, and its log."""
    folder = RunFolder(tmp_path / "runs/mine")
    with claimed(folder, "train: {iterations: 10}\n", False):
        for number in range(1, 5):
            folder.append_metrics(number, step(number))
        log.event("lost", "engine http://a is lost: killed")
        log.event("published", "version 4", 10)
    return folder


def shown(run: Watched, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(view(run, width, NOW))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    return text


@pytest.mark.parametrize(
    ("points", "width", "height", "lines"),
    [
        ([(0, 0), (1, 1)], 2, 1, ["⡠⠊"]),
        ([(0, 1), (1, 0)], 2, 1, ["⠑⢄"]),
        ([(3, 5), (9, 5)], 2, 1, ["⠤⠤"]),  # a constant: half way up
        ([(0, 0), (7, 7)], 4, 2, ["⠀⠀⡠⠊", "⡠⠊⠀⠀"]),
        ([(2, 1)], 1, 1, ["⠄"]),
    ],
)
def test_a_line_is_drawn_dot_by_dot(
    points: list[tuple[float, float]], width: int, height: int, lines: list[str]
) -> None:
    assert [line.plain for line in draw([Curve(points, "red")], width, height)] == lines


def test_the_view_says_what_a_run_says(folder: RunFolder) -> None:
    run = read(folder.path)
    text = shown(run)
    assert not run.running
    assert re.search(r"mine  finished *\nstep 4 of 10", text)
    for title in (
        "reward 0.400",
        "accuracy 60.0%",
        "tokens 96.0",
        "tokens right 86.0 wrong 120.0",
        "entropy 0.500",
    ):
        assert f"─ {title} ─" in text
    assert "engines: 3 serving, 1 lost, 1 back" in text
    assert "1,234 tokens/s" in text
    assert "seconds: rollout 6.5, train 3.0" in text
    assert "[lost] engine http://a is lost: killed" in text
    assert "version 4" not in text
    assert shown(run, 40).count("╭") == 6
    for width, columns in ((60, 1), (90, 2), (120, 3), (200, 3)):
        assert max(line.count("╭") for line in shown(run, width).splitlines()) == columns


def test_a_run_that_works_has_time_left_and_one_that_was_killed_says_so(folder: RunFolder) -> None:
    with claimed(folder, "train: {iterations: 10}\n", True):
        folder.go_on_from(4, 10)
        run = read(folder.path)
        assert run.running
        lines = [line.rstrip() for line in shown(run._replace(name="n" * 98)).splitlines()]
        at = lines.index("n" * 98 + "  running")
        assert lines[at + 1].startswith("step 4 of 10  left 1m00s")
    assert state(read(folder.path)) == "finished"
    assert (
        state(run._replace(running=False))
        == "ended without a log line: killed, or its machine failed"
    )
    assert state(Watched("a", 0, [], [], False)) == "no process works on it"
    evaluated = Line(NOW, 0, "INFO", "end", "evaluation base: finished")
    killed = [Line(NOW, 0, "INFO", "start", "runs/mine: efr train a.yaml"), evaluated]
    assert state(run._replace(running=False, log=killed)) == (
        "ended without a log line: killed, or its machine failed"
    )
    assert state(run._replace(running=False, log=[evaluated])) == "evaluation base: finished"
    assert state(
        run._replace(running=False, log=[Line(NOW, 0, "ERROR", "end", "with an error: no\nroom")])
    ) == ("with an error: no")


def test_the_log_is_shown_without_a_servers_colours_and_without_text_too(folder: RunFolder) -> None:
    told = ["\x1b[31mred\x1b[0m end\nmore", ""]
    run = read(folder.path)._replace(log=[Line(NOW, 0, "INFO", "end", text) for text in told])
    shown_lines = [line.rstrip() for line in shown(run).splitlines()]
    assert shown_lines[-2:] == ["03:04:05 [end] red end", "03:04:05 [end]"]


def test_time_left_counts_steps_that_are_not_logged(folder: RunFolder) -> None:
    # a warm start: each tenth update
    lines = [{"step": 10 * number, "time/total": 50.0} for number in range(1, 13)]
    assert seconds_left(Watched("sft", 200, lines, [], True)) == 5.0 * 80
    assert seconds_left(Watched("sft", 0, lines, [], True)) is None


def test_what_is_no_runs_folder_is_refused_and_a_familys_members_are_named(
    folder: RunFolder,
) -> None:
    with pytest.raises(UserError, match=r"no run's folder: .* the runs below it are .*runs/mine$"):
        read(folder.path.parent)


@pytest.mark.parametrize("terminal", [False, True])
def test_outside_a_terminal_and_in_a_dumb_one_there_is_one_view(
    folder: RunFolder, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with claimed(folder, "train: {iterations: 10}\n", True), closing(io.StringIO()) as file:
        watch(folder.path, Console(file=file, width=100, force_terminal=terminal), every_s=60)
        assert file.getvalue().count("step 4 of 10") == 1
        assert "\x1b[?" not in file.getvalue()


def test_a_view_that_is_ended_leaves_the_terminal_as_it_was(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(time, "sleep", lambda _: signal.raise_signal(signal.SIGTERM))
    with claimed(folder, "train: {iterations: 10}\n", True), closing(io.StringIO()) as file:
        with pytest.raises(SystemExit, match="143"):
            watch(
                folder.path,
                Console(file=file, width=100, height=40, force_terminal=True),
                every_s=60,
            )
        shown = file.getvalue()
    # the other screen, no cursor
    for entered, left in (("\x1b[?1049h", "\x1b[?1049l"), ("\x1b[?25l", "\x1b[?25h")):
        assert 0 <= shown.find(entered) < shown.rfind(left)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """A pseudo-terminal: the side of its user, and the program's."""
    user, program = pty.openpty()
    yield user, program
    os.close(user)
    os.close(program)


@pytest.mark.heavy
def test_in_a_terminal_it_follows_the_run_to_its_end(
    folder: RunFolder, terminal: tuple[int, int]
) -> None:
    user, program = terminal
    command = [
        sys.executable,
        "-m",
        "megatron_efr.cli",
        "watch",
        str(folder.path),
        "--every",
        "0.2",
    ]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    said = b""

    def wait_for(text: bytes) -> None:
        nonlocal said
        limit = time.monotonic() + 60
        while text not in said:
            assert time.monotonic() < limit, said.decode(errors="replace")[-2000:]
            if select.select([user], [], [], 1)[0]:
                said += os.read(user, 65536)

    with claimed(folder, "train: {iterations: 10}\n", True):
        folder.go_on_from(4, 10)
        watching = subprocess.Popen(command, stdout=program, stderr=program, env=environment)
        wait_for(b"step 4 of 10")
        folder.append_metrics(5, step(5))
        wait_for(b"step 5 of 10")
    wait_for(b"finished")
    limit = time.monotonic() + 60
    while watching.poll() is None:  # it writes on, and would wait for a reader
        assert time.monotonic() < limit
        if select.select([user], [], [], 0.1)[0]:
            os.read(user, 65536)
    assert watching.returncode == 0
