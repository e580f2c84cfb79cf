"""Ends of programs: by Ctrl-C, into a pipe that nobody reads, on a full disk, with their
launcher.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from megatron_efr.arguments import PORTS, within
from megatron_efr.watch import main as watch

RUN = """
import argparse, os, sys, time
from megatron_efr import arguments

def program(argv):
    {body}

arguments.run(program)
"""


def start(body: str, **options: object) -> subprocess.Popen[str]:
    environment = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment} | options
    # what a shell runs in the background, these tests perhaps, ignores Ctrl-C, and so would this
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        [sys.executable, "-c", RUN.format(body=body)], text=True, preexec_fn=heeds, **pipes
    )  # pyright: ignore


def ended(body: str, **options: object) -> tuple[int, str, str]:
    process = start(body, **options)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def interrupt(process: subprocess.Popen[str]) -> tuple[int, str]:
    assert process.stdout is not None
    assert process.stdout.readline() == "works\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_ctrl_c_is_130_and_one_line() -> None:
    assert interrupt(start("print('works', flush=True); time.sleep(60)")) == (130, "interrupted\n")


def test_a_second_ctrl_c_ends_a_program_that_takes_long_to_tidy_up() -> None:
    body = (
        "try: print('works', flush=True); time.sleep(60)\n    finally: print('tidies', "
        "flush=True); time.sleep(60)"
    )
    process = start(body)
    assert process.stdout is not None
    for line in ("works\n", "tidies\n"):
        assert process.stdout.readline() == line
        process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("for i in range(10**6): print(i)", 141),
        ("print('short')", 141),
        ("raise SystemExit(0)", 0),
        ("argparse.ArgumentParser().parse_args(['-h'])", 0),  # argparse takes it for granted
    ],
)
def test_a_pipe_that_nobody_reads_ends_a_program_without_a_word(body: str, expected: int) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    code, _, err = ended(body, stdout=writes)
    os.close(writes)
    assert (code, err) == (expected, "")


def test_head_takes_what_it_wants() -> None:
    command = f'{sys.executable} -c "$PROGRAM" | head -n 1; echo "${{PIPESTATUS[0]}}"'
    program = RUN.format(body="for i in range(10**6): print(i)")
    done = subprocess.run(
        ["bash", "-c", command],
        env=os.environ | {"PROGRAM": program},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("0\n141\n", "")


def test_a_broken_pipe_that_is_not_the_programs_output_is_a_fault_and_shows_itself() -> None:
    code, _, err = ended("raise BrokenPipeError('to a worker')")
    assert code == 1
    assert "BrokenPipeError: to a worker" in err


def test_a_disk_error_that_nobody_foresaw_is_a_sentence() -> None:
    code, _, err = ended("raise OSError(28, 'No space left on device', '/x/y')")
    assert code == 2
    assert err.startswith("error: /x/y: No space left on device; ")
    assert err.count("\n") == 1


def test_in_a_thread_it_is_a_line_and_another_error_shows_itself() -> None:
    thread = (
        "import threading; t = threading.Thread(target=fail, name='writer'); t.start(); t.join()"
    )
    code, _, err = ended(f"def fail(): raise OSError(28, 'No space left on device')\n    {thread}")
    assert (code, err) == (0, "writer: [Errno 28] No space left on device\n")
    assert "ValueError: 1" in ended(f"def fail(): raise ValueError(1)\n    {thread}")[2]


def test_output_to_a_full_device_is_a_sentence() -> None:
    with open("/dev/full", "w") as full:
        code, _, err = ended("print('x', flush=True)", stdout=full)
        assert (code, err.split(";")[0]) == (2, "error: output: No space left on device")
        code, _, err = ended("print('x')", stdout=full)
        assert (code, err.split(";")[0]) == (2, "error: output: No space left on device")


RANKS = """
import os, sys
import torch.distributed as dist
from megatron_efr import arguments
from megatron_efr.errors import UserError

def program(argv):
    dist.init_process_group("gloo")
    dist.barrier()
    if os.environ["RANK"] == "0":
        {body}
    dist.barrier()

arguments.run(program)
"""


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("body", "tracebacks"), [("raise UserError('the disk is full')", 0), ("1 / 0", 1)]
)
def test_ranks_that_waited_for_one_that_failed_leave_the_word_to_it(
    body: str, tracebacks: int, tmp_path: Path
) -> None:
    (tmp_path / "ranks.py").write_text(RANKS.format(body=body))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(tmp_path / "ranks.py")],
        capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 1
    # a rank's own; torchrun has one of its own
    assert done.stderr.count("]: Traceback (most recent call last)") == tracebacks
    assert ("error: the disk is full" in done.stderr) == (not tracebacks)


def test_the_exit_codes_of_programs_are_their_own() -> None:
    assert ended("sys.exit(75)")[0] == 75
    assert ended("pass")[0] == 0
    assert ended("sys.exit('said')")[::2] == (1, "said\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [("0.05", "0.05: at least 0.1"), ("nan", "nan: at least 0.1"), ("inf", "inf: at least 0.1")],
)
def test_a_number_out_of_range_is_refused_by_its_flag(
    text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        watch(["runs/a", "--every", text])
    assert capsys.readouterr().err.endswith(f"efr watch: error: argument --every: {said}\n")


def test_a_range_has_both_ends() -> None:
    port = within(int, *PORTS)
    assert (port("1"), port("65535")) == (1, 65535)
    for text in ("0", "65536"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text}: from 1 to 65535$"):
            port(text)


LAUNCHED = """
import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", os.environ["PROGRAM"]], env=os.environ | {{{extra}}}).wait()
"""
PROGRAM = """
import os, time
from megatron_efr.parent import end_with_parent
end_with_parent()
print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("reaped", [True, False])
@pytest.mark.parametrize("rank", [{}, {"TORCHELASTIC_RUN_ID": "x"}])
def test_a_program_whose_launcher_ended_before_it_could_look_ends_at_once(
    rank: dict[str, str], reaped: bool
) -> None:
    """It is another process's child by then; a rank would wait half an hour for a meeting place
    that is gone.
    """
    launcher = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, launcher.pid, os.WEXITED | os.WNOWAIT)
    if reaped:
        launcher.wait()
    environment = os.environ | rank | {"MEGATRON_EFR_LAUNCHER": str(launcher.pid)}
    orphan = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, timeout=60
    )
    assert (orphan.returncode, orphan.stdout) == (-signal.SIGKILL, b"")
    launcher.wait()


@pytest.mark.parametrize(
    ("extra", "survives"),
    [
        ("'TORCHELASTIC_RUN_ID': 'x'", False),
        ("'MEGATRON_EFR_LAUNCHER': str(os.getpid())", False),
        ("'MEGATRON_EFR_LAUNCHER': '1'", True),
    ],
)
def test_a_launcher_that_is_killed_takes_its_programs_along(extra: str, survives: bool) -> None:
    command, environment = (
        [sys.executable, "-c", LAUNCHED.format(extra=extra)],
        os.environ | {"PROGRAM": PROGRAM},
    )
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    child = psutil.Process(int(launcher.stdout.readline()))
    launcher.kill()
    launcher.wait()
    if survives:
        time.sleep(0.2)
        assert child.status() != psutil.STATUS_ZOMBIE
        child.kill()
    else:
        psutil.wait_procs([child], timeout=10)
        assert not child.is_running()
