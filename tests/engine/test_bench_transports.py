"""tools/bench/transports.py: publications to servers of its own, by each transport."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.conftest import PYTHON

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_transport_is_timed_beside_a_bare_broadcast() -> None:
    if not os.access(PYTHON, os.X_OK):
        pytest.skip(f"{PYTHON} is not there: bash tools/setup_sglang_cpu.sh makes it")
    command = [
        sys.executable,
        str(ROOT / "tools/bench/transports.py"),
        "--hidden",
        "64",
        "--turns",
        "1",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--python", str(PYTHON)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [
        line.split("|")
        for line in done.stdout.splitlines()
        if line.startswith("| ") and " s |" in line
    ]
    assert [row[1].strip() for row in rows] == ["tensor", "distributed", "disk"]
    assert all(float(row[column].split()[0]) > 0 for row in rows for column in (4, 6))
