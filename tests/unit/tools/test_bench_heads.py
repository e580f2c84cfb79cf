"""tools/bench/heads.py starts on a CPU, and says what it cannot measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="says what happens without a CUDA device"
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / "bench" / "heads.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=200
    )


def test_smoke_run_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    done = run("--device", "cpu", "--quick", "--json", str(tmp_path / "heads.json"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "heads.json").read_text())
    assert len(result["rows"]) == 5
    for row in result["rows"]:
        assert row["note"] == ""
        assert row["both"] > 0
        assert row["gradient_error"] <= 1e-5
        assert row["logprob_error"] is None or row["logprob_error"] <= 1e-5
        assert f"| {row['head']} |" in done.stdout
    assert "our Triton kernels: not measured (auto: there is no CUDA device)" in done.stdout
    assert "cut-cross-entropy: not measured" in done.stdout


def test_without_a_device_it_says_so() -> None:
    done = run()
    assert done.returncode == 1
    assert "there is no CUDA device; `--device cpu --quick`" in done.stderr
