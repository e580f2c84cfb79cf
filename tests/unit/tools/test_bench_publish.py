"""tools/bench/publish.py: a smoke run, and the memory that a publication takes, which it
measures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.alike

ROOT = Path(__file__).resolve().parents[3]
MIB = 2**20


@pytest.mark.heavy
def test_a_publication_takes_two_buckets_and_the_largest_tensor_at_most(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [
        sys.executable,
        str(ROOT / "tools" / "bench" / "publish.py"),
        "--quick",
        "--json",
        str(figures),
    ]
    # freed memory goes back to the system, so that resident memory is what is held
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    for row in found["measured"]:
        assert row["peak_extra_mib"] <= row["limit_mib"] + 4  # the sockets' own
        assert row["again_extra_mib"] <= 4  # the first one's memory is used again
        assert row["limit_mib"] + 4 < 0.6 * row["gb"] * 1e9 / MIB  # all at once would be far more
        assert row["seconds"] > 0 < row["bare_seconds"]
    assert all(statement["seconds"] < statement["goal_s"] for statement in found["model"])
    assert done.stdout.count("\n| ") == len(found["measured"]) + len(found["model"]) + 1
