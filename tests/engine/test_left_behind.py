"""A trainer that is interrupted, ended or killed leaves no process of its real SGLang server
behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.engine.conftest import PYTHON

ROOT = Path(__file__).parents[2]

TRAINER = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from tests.engine.conftest import rollout, start
launcher, urls = start(Path(sys.argv[1]), rollout(), Path(sys.argv[2]))
with launcher:
    print(launcher.servers[0].process.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(
    not os.access(PYTHON, os.X_OK), reason="bash tools/setup_sglang_cpu.sh makes .venv-sglang"
)
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        signal.SIGKILL,
    ],
    ids=lambda number: number.name,
)
def test_no_server_is_left(
    folders: tuple[Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tmp_path / "engines"), str(folders[0])],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )
    assert trainer.stdout is not None
    # after the launcher's own lines
    pid = next(int(line) for line in trainer.stdout if line.strip().isdigit())
    supervisor = psutil.Process(pid)
    processes = [supervisor, *supervisor.children(recursive=True)]
    assert len(processes) >= 3  # the supervisor, the web server and its scheduler at least
    trainer.send_signal(number)
    trainer.wait(60)
    _, left = psutil.wait_procs(processes, timeout=60)
    assert [process.cmdline() for process in left] == []
