"""A sweep's file, whole: two of the family's methods, killed between them, end as a sweep that was
not.
"""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest
from pyarrow import parquet

from tests.loop.conftest import Program, digests, metrics
from tests.loop.test_interruption import start, wait_for

FAMILY = Path(__file__).parents[2] / "examples/family.yaml"


def arguments(task: Path, runs: Path) -> list[str]:
    """Two methods of one seed, one of which remembers, for two iterations of a model that has
    learnt nothing.
    """
    values = {
        "runs": runs,
        "model.path": task / "model",
        "model.init": "random",
        "data.datasets.0.path": task / "train.jsonl",
        "evaluation.datasets.0.path": task / "test.jsonl",
        "rollout.prompts": 4,
        "rollout.samples": 4,
        "rollout.max_new_tokens": 24,
        "evaluation.max_new_tokens": 24,
        "train.iterations": 2,
    }
    overrides = [f"{key}={value}" for key, value in values.items()]
    return [str(FAMILY), *overrides, "--only=efr_seed-2", "--only=short_rl_seed-2", "--jobs=1"]


@pytest.mark.slow
@pytest.mark.parallel
def test_a_killed_sweep_keeps_what_has_finished_and_ends_as_one_that_was_not(
    task: Path, program: Program, tmp_path: Path
) -> None:
    members = ["efr_seed-2", "short_rl_seed-2"]
    whole, killed = tmp_path / "whole/family", tmp_path / "killed/family"
    program("sweep", *arguments(task, whole.parent))
    running = start(["megatron_efr.sweep", *arguments(task, killed.parent)])
    wait_for(killed / members[1] / "metrics.jsonl", running)
    programs = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=60)
    psutil.wait_procs(programs, 60)
    assert (killed / "finished" / f"{members[0]}.yaml").exists()
    assert not (killed / "eval").exists()
    before = (killed / members[0] / "model/model.safetensors").stat().st_mtime_ns
    program("sweep", "--resume", *arguments(task, killed.parent))
    assert (killed / members[0] / "model/model.safetensors").stat().st_mtime_ns == before, (
        "it was not run again"
    )
    for member in members:
        assert metrics(killed / member) == metrics(whole / member)
        assert digests(killed / member / "model") == digests(whole / member / "model")
    assert digests(killed / "eval") == digests(whole / "eval")
    tables = [
        parquet.read_table(folder / "table.parquet").drop_columns("path")
        for folder in (whole, killed)
    ]
    assert tables[0].equals(tables[1])
    assert tables[0]["model"].to_pylist() == ["base", *members]
    assert tables[0]["method.name"].to_pylist() == [None, "efr", "short_rl"]
    assert (killed / "report/family.svg").exists()
    assert "All measures" in (killed / "report/index.html").read_text()
