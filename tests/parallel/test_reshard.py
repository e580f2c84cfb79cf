"""Policies of every layout hand out the folder's own tensors, whole, by one plan that all ranks share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import make_model_folder
from tests.families import make_family_folder

pytestmark = pytest.mark.parallel

TWO = [
    "tied:tensor=2:float32",
    "untied:pipeline=2:bfloat16",
    "tied:pipeline=2,virtual_pipeline=2:float32",
    "moe:expert=2:float32",
    "one-group:tensor=2:bfloat16",  # one KV group on two ranks
]
FOUR = ["untied:tensor=2,pipeline=2:float32", "tied:tensor=2:bfloat16", "moe:tensor=2,sequence=true,expert=2:float32"]


@pytest.mark.parametrize(("processes", "cases"), [(2, TWO), pytest.param(4, FOUR, marks=pytest.mark.slow)])
def test_parcels_are_the_folders_tensors(processes: int, cases: list[str], tmp_path: Path) -> None:
    models = tmp_path / "models"
    make_model_folder(models / "tied", tied=True)
    make_model_folder(models / "untied", tied=False)
    make_family_folder(models / "moe", "qwen3-moe")
    make_family_folder(models / "one-group", "qwen3-tied")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, "-m", "tests.parallel.resharded", str(models), str(tmp_path), *cases],
        cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    plans = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(len(cases))]
    assert all(plan["buckets"] > 3 for plan in plans)
    assert any(plan["largest"] > 40_000 for plan in plans)
