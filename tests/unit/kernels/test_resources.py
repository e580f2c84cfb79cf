"""Every shipped Triton kernel compiles for sm_90a without a GPU, spills nothing, and fits; in a
process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
# a minute and a half of compiling what changes with the kernels' sources alone
pytestmark = [pytest.mark.alike, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[3]
MOST_REGISTERS = 128  # 2048 / 128 = 16 warps of 32 threads still fit a multiprocessor


def test_no_kernel_spills(tmp_path: Path) -> None:
    figures = tmp_path / "resources.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "kernel_resources.py"), "--json", str(figures)],
        capture_output=True, text=True, cwd=ROOT, timeout=400,
        env=environment | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(figures.read_text())
    names = {row["name"].split()[0] for row in rows}
    assert names == {"statistics", "gradient", "policy", "credits"}, (
        "a kernel is missing from the gate"
    )
    for row in rows:
        assert (row["stack_bytes"], row["local_loads"], row["local_stores"]) == (0, 0, 0), row
        assert row["registers"] <= MOST_REGISTERS, row
