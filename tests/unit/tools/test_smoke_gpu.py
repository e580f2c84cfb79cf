"""tools/smoke_gpu.sh starts on a CPU, in small, and says what it leaves out there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [
    pytest.mark.alike,
    pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device"),
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHON": sys.executable,
    }
    command = ["bash", str(ROOT / "tools/smoke_gpu.sh"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300
    )


@pytest.mark.heavy
def test_all_of_it_that_a_cpu_can_do_is_done_and_the_rest_is_named() -> None:
    done = run("--cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| policy | tiny shape, float32," in done.stdout
    for name in ("log-probs", "update"):
        [line] = [line for line in done.stdout.splitlines() if line.startswith(f"| {name} |")]
        assert float(line.split("|")[2].split()[0]) > 0
        assert "no peak is known of cpu" in line
    assert "| bucket by handle | not measured: CUDA handles need a CUDA device |" in done.stdout
    assert "needs a CUDA device" in done.stdout.split("-- the tests that need a card")[1]
    assert "| tiny, T 96, 1/1 |" in done.stdout.split("-- the head's kernels")[1]


def test_an_unknown_option_is_named() -> None:
    done = run("--cuda")
    assert done.returncode == 2
    assert done.stderr == "smoke_gpu: unknown option --cuda (--cpu)\n"
