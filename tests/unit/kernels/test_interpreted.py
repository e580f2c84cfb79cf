"""The kernel suite under Triton's interpreter, which must be asked for before triton is first
imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [pytest.mark.alike, pytest.mark.heavy]
ROOT = Path(__file__).resolve().parents[3]
INTERPRETED = os.environ | {
    "TRITON_INTERPRET": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}


def run(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", "-m", *command],
        capture_output=True, text=True, cwd=ROOT, env=INTERPRETED, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


def test_suite() -> None:
    run("pytest", "tests/kernel_suite.py", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning")


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_tensor_parallel_over_gloo(ranks: int) -> None:
    run(
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        "-m",
        "tests.kernel_ranks",
    )
