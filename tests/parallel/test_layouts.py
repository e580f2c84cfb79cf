"""Tensor, sequence, pipeline and data parallelism over gloo give what one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.parallel

LAYOUTS = {
    "tensor=2": 2,
    "tensor=2,sequence=true": 2,
    "pipeline=2": 2,
    "": 2,  # data parallel
    "tensor=2,sequence=true,pipeline=2": 4,
    "tensor=2,sequence=true,": 4,  # with data parallel
}


def run(model: Path, out: Path, layout: str, processes: int) -> dict[str, Any]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, "-m", "tests.parallel.layout", str(model), str(out), layout],
        cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out)


@pytest.fixture(scope="module", params=["tied", "untied"])
def single(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    model: Path = request.getfixturevalue(f"{request.param}_model")
    return model, run(model, tmp_path_factory.mktemp("single") / "result.pt", "", 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout: str, single: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    model, one = single
    many = run(model, tmp_path / "result.pt", layout, LAYOUTS[layout])
    assert one["logprobs"].keys() == many["logprobs"].keys()
    assert max(float((one["logprobs"][i] - many["logprobs"][i]).abs().max()) for i in one["logprobs"]) <= 1e-5
    for name, gradient in one["gradients"].items():
        assert float((gradient - many["gradients"][name]).norm() / gradient.norm()) <= 1e-5, name
    for name, weight in one["weights"].items():
        assert float((weight - many["weights"][name]).abs().max()) <= 1e-6, name
    for mine, theirs in zip(one["metrics"], many["metrics"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
