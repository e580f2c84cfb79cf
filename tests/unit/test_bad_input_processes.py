"""Bad input, through real processes: exit code 2 and no traceback, on one rank and on two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.unit import test_bad_input
from tests.unit.test_bad_input import configuration

pytestmark = pytest.mark.alike

task = test_bad_input.task


def launched(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.heavy
def test_the_command_line_ends_with_2_and_no_traceback(task: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(configuration("train", task)))
    done = launched("megatron_efr.cli", "train", str(config), "method.alpha=2")
    assert done.returncode == 2
    assert f"error: {config}: method.alpha: Input should be less than 1 (got 2" in done.stderr
    assert "Traceback" not in done.stderr
    config.write_text("name: [\n")
    done = launched("megatron_efr.sft", str(config))
    assert done.returncode == 2
    assert f"error: {config}:2: not valid YAML" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.samples=3", "train.updates: 3 responses per update"),
        ("data.datasets.0.path=absent.jsonl", "absent.jsonl: "),
    ],
)
def test_two_ranks_end_together_and_the_first_says_why(
    override: str, message: str, task: Path, tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        yaml.safe_dump(configuration("train", task) | {"runs": str(tmp_path / "runs")})
    )
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    done = launched(*torchrun, "megatron_efr.train", str(config), "rollout.prompts=2", override)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert message in done.stderr
    assert done.stderr.count("exitcode  : 2 ") >= 1
    assert "exitcode  : 1 " not in done.stderr
    assert "[rank" not in done.stderr, "a rank ended with a traceback"
