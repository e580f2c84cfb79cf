"""An iteration's updates alone, from its saved rollouts, give the run's numbers; a run that has to
stop keeps them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_efr.observe import deterministic
from megatron_efr.run.folder import RunFolder
from tests.loop.conftest import Program, digests, state


def of_updates(metrics: Mapping[str, object]) -> dict[str, object]:
    """The figures that a replay gives too: it makes updates, and teaches the method nothing."""
    return {
        key: value for key, value in deterministic(metrics).items() if not key.startswith("method/")
    }


def replayed(program: Program, config: Path, run: Path, step: int) -> tuple[str, dict[str, object]]:
    """(all that a replay prints, its metrics), and the run folder is as it was."""
    before = digests(run)
    done = program(
        "train", config, f"runs={run.parent}", "--replay", RunFolder(run).rollouts_path(step)
    )
    assert digests(run) == before
    [line] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return done.stdout, deterministic(line)


def test_a_replayed_iteration_gives_the_runs_metrics_bit_for_bit(
    config: Path, whole: Path, program: Program
) -> None:
    lines = [of_updates(line) for line in RunFolder(whole).read_metrics()]
    for step, start in ((1, "the start"), (3, "the checkpoint of iteration 2")):
        printed, metrics = replayed(program, config, whole, step)
        assert f"replaying iteration {step} from {start}\n" in printed
        assert metrics == lines[step - 1]


@pytest.mark.slow
def test_iterations_between_the_checkpoint_and_the_file_are_replayed_first(
    config: Path, whole: Path, program: Program
) -> None:
    printed, metrics = replayed(program, config, whole, 4)
    assert "replaying iteration 4 from the checkpoint of iteration 2\n" in printed
    assert metrics == of_updates(RunFolder(whole).read_metrics()[3])


@pytest.mark.slow
def test_a_replay_says_when_its_numbers_will_not_be_the_runs(
    config: Path, whole: Path, program: Program, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    RunFolder(run).rollouts_path(3).unlink()
    printed, metrics = replayed(program, config, run, 4)
    assert f"the numbers will not be the run's: {RunFolder(run).rollouts_path(3)}" in printed
    assert metrics["grad_norm"] != RunFolder(whole).read_metrics()[3]["grad_norm"]
    refused = program(
        "train", config, f"runs={tmp_path}", "--replay", run / "metrics.jsonl", expect=2
    )
    assert "its name says no iteration" in refused.stderr


def test_a_run_that_only_skips_updates_stops_and_keeps_the_rollouts_to_replay(
    config: Path, program: Program, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    overrides = [
        "method.name=failing",
        "observe.rollouts=false",
        "checkpoint.every=1",
        f"runs={tmp_path}",
    ]
    for resume in (
        [],
        ["--resume"],
    ):  # two updates of iteration 2 are skipped and two of 3, which one finds resumed too
        stopped = program("train", *resume, config, *overrides, expect=2)
        assert "iteration 3: the last 4 updates" in stopped.stderr
        assert f"--replay {run.rollouts_path(3)}" in stopped.stderr
        assert [line["skipped"] for line in run.read_metrics()] == [0.0, 1.0, 1.0]
        assert [line["grad_norm"] is None for line in run.read_metrics()] == [False, True, True]
        assert [path.name for path in sorted(run.rollouts.iterdir())] == [
            run.rollouts_path(s).name for s in (2, 3)
        ]
        assert (run.checkpoints / "latest").read_text() == "step_000002"
        assert state(run.path, 2)["step"] == 2
    before = digests(run.path)
    done = program("train", config, *overrides, "--replay", run.rollouts_path(3))
    assert digests(run.path) == before
    [line] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert of_updates(line) == of_updates(run.read_metrics()[2])
