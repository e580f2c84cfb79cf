"""Programs of a sweep, several at a time: their output told apart, and all of them ended where the sweep is."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_efr.durable import writing
from megatron_efr.errors import UserError
from megatron_efr.parent import LAUNCHER


def side_by_side(commands: Sequence[tuple[str, list[str]]], logs: Path, jobs: int) -> None:
    """Run named commands, `jobs` at a time; those that fail are named with their logs, and the run ends."""
    running: dict[str, subprocess.Popen[str]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            codes = list(pool.map(lambda named: _run(named[0], named[1], logs, running), commands))
        except BaseException:  # Ctrl-C, or the terminal is gone: the pool waits for what runs
            for process in list(running.values()):
                process.send_signal(signal.SIGINT)
            raise
    failed = [name for (name, _), code in zip(commands, codes, strict=True) if code]
    if failed:
        raise UserError(f"{', '.join(failed)} failed; see {logs}")


def _run(name: str, command: list[str], logs: Path, running: dict[str, subprocess.Popen[str]]) -> int:
    """One command, its output to a log and, with its name before each line, to the terminal."""
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), LAUNCHER: str(os.getpid())}
    with writing(logs):
        logs.mkdir(parents=True, exist_ok=True)
    with (
        open(logs / f"{name.replace(' ', '-')}.txt", "w", encoding="utf-8") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process,
    ):
        running[name] = process
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            print(f"{name:>14} | {line}", end="", flush=True)
    return process.returncode
