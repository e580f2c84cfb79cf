"""A run that is killed and resumed equals one that was not, bit for bit: metrics, rollouts,
weights, prompts.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest

from megatron_efr.observe import EXIT_STUCK
from megatron_efr.run.folder import RunFolder
from megatron_efr.types import Response
from tests.loop.conftest import Program, digests, metrics, state

SFT = """
name: run
seed: 3
model: {{path: {task}/model, init: random}}
data: {{path: {task}/sft.jsonl}}
prompt: {{template: "{{question}}"}}
optimizer: {{lr: 1e-3, schedule: cosine, warmup_updates: 3}}
train: {{updates: 8, batch: 8, bucket: 3, log_every: 2}}
checkpoint: {{every: 4, keep: 2}}
observe: {{tensorboard: false}}
"""


def assert_equal(run: Path, whole: Path) -> None:
    assert metrics(run) == metrics(whole)
    assert digests(run / "rollouts") == digests(whole / "rollouts")
    assert digests(run / "model") == digests(whole / "model")
    assert state(run, 4) == state(whole, 4)
    assert (run / "checkpoints/latest").read_text() == "step_000004"
    assert not list((run / "journal").glob("*"))


def test_the_uninterrupted_run_learns_and_uses_every_prompt_once(whole: Path) -> None:
    """Were its weights standing still, or its prompts all alike, the other tests would show
    nothing.
    """
    lines = RunFolder(whole).read_metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["grad_norm"] > 0.01 for line in lines)
    assert lines[0]["kl"] == 0
    assert all(abs(line["kl"]) > 1e-6 for line in lines[1:])
    assert all(line["first_ratio_max"] == 1 and line["first_kl_to_old"] == 0 for line in lines)
    groups = [
        credited.group for step in range(1, 5) for credited in RunFolder(whole).read_rollouts(step)
    ]
    assert len({group.prompt.id for group in groups}) == 16
    assert len({group.seed for group in groups}) == 16
    assert {r.versions[0].version for group in groups[12:] for r in group.responses} == {3}
    kept = state(whole, 4)
    assert kept["stream"]["next_index"] == 16
    assert kept["watch"]["start"] == lines[0]["entropy"]
    assert kept["method"]["state"]["seen"] == 16
    assert len(kept["method"]["history"]) == 16


def test_killed_again_and_again_a_run_equals_one_that_was_not(
    config: Path, whole: Path, program: Program, tmp_path: Path
) -> None:
    run, override = tmp_path / "run", f"runs={tmp_path}"
    folder = RunFolder(run)
    journal = run / "journal/step_000003.jsonl"

    program("train", config, override, killed_at="rollout:3:2")
    assert metrics(run) == metrics(whole)[:2]
    *finished, torn = journal.read_bytes().split(b"\n")
    assert len(finished) == 2
    assert torn

    program("train", "--resume", config, override, killed_at="update:2")
    assert journal.read_bytes().split(b"\n")[:2] == finished, "a finished group was generated again"
    assert len(folder.journal(3).read().groups) == 4
    assert folder.rollouts_path(3).read_bytes() == RunFolder(whole).rollouts_path(3).read_bytes()
    assert metrics(run) == metrics(whole)[:2]

    program("train", "--resume", config, override, killed_at="logged:3")
    *lines, torn = (run / "metrics.jsonl").read_text().split("\n")
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert torn

    program("train", "--resume", config, override, killed_at="save:4")
    assert metrics(run) == metrics(whole)
    assert (run / "checkpoints/step_000004.partial").is_dir()
    assert (run / "checkpoints/latest").read_text() == "step_000002"

    program("train", "--resume", config, override, killed_at="renamed:4")
    assert not list((run / "checkpoints").glob("*.partial"))
    assert (run / "checkpoints/latest").read_text() == "step_000002"
    assert not (run / "model").exists()

    done = program("train", "--resume", config, override)
    assert "4/4" not in done.stdout, "the checkpoint was whole, and an iteration was made again"
    folder.clear_journals(4)  # the killed save had no time to
    assert_equal(run, whole)


def test_a_run_that_its_watchdog_ended_is_resumed_and_equals_one_that_was_not(
    config: Path, whole: Path, program: Program, tmp_path: Path
) -> None:
    run, override = tmp_path / "run", f"runs={tmp_path}"
    stuck = program(
        "train", config, override, "observe.watchdog_s=20", killed_at="stuck:5", expect=EXIT_STUCK
    )
    said = "watchdog: rank 0 has been in phase 'train' for "
    assert said in stuck.stderr
    stacks = (run / "stuck_rank0.txt").read_text()
    assert stacks.startswith(said)
    assert "killed.py" in stacks
    assert metrics(run) == metrics(whole)[:2]
    program("train", "--resume", config, override)
    assert_equal(run, whole)


def test_sharing_the_device_with_the_engine_changes_nothing_killed_or_not(
    config: Path, whole: Path, program: Program, tmp_path: Path
) -> None:
    overrides = (f"runs={tmp_path}", "rollout.placement=colocated")
    program("train", config, *overrides, killed_at="update:6")  # in iteration 3
    assert metrics(tmp_path / "run") == metrics(whole)[:2]
    program("train", "--resume", config, *overrides)
    assert_equal(tmp_path / "run", whole)
    for line in RunFolder(tmp_path / "run").read_metrics():
        for phase in (
            "rollout",
            "release",
            "restore",
            "logprobs",
            "train",
            "offload",
            "wake",
            "publish",
            "resume",
        ):
            assert line[f"time/{phase}"] > 0
            assert 0.1 < line[f"time/{phase}_memory_gib"] <= line["time/memory_gib"]


def test_killed_while_a_checkpoint_is_written_in_the_background_a_run_goes_on_from_the_one_before(
    config: Path, whole: Path, program: Program, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    overrides = (f"runs={tmp_path}", "checkpoint.every=1", "checkpoint.background=true")
    program("train", config, *overrides, killed_at="background:2")
    assert (run / "checkpoints/latest").read_text() == "step_000001"
    assert (run / "checkpoints/step_000002.partial").is_dir()
    assert metrics(run)[:2] == metrics(whole)[:2]
    journals = sorted(path.stem for path in (run / "journal").iterdir())
    assert journals[:2] == ["step_000002", "step_000003"], "what no checkpoint covers is kept"
    done = program("train", "--resume", config, *overrides)
    assert [line.split("/4")[0] for line in done.stdout.splitlines() if "/4" in line] == [
        "2",
        "3",
        "4",
    ]
    assert_equal(run, whole)


def test_what_libraries_say_about_themselves_does_not_reach_stderr(
    config: Path, program: Program, tmp_path: Path
) -> None:
    """A run, and what resumes it, with Megatron's distributed optimizer: nothing that a user must
    wonder about.
    """
    overrides = [
        f"runs={tmp_path}",
        "checkpoint.every=1",
        "parallel.ddp={use_distributed_optimizer: true}",
    ]
    for arguments in (["train.iterations=1"], ["train.iterations=2", "--resume"]):
        said = program("train", config, *overrides, *arguments).stderr.splitlines()
        # a model that has learnt nothing does not end its responses, of which the run itself warns
        own = r"\d\d:\d\d:\d\d rank 0 (INFO|WARNING \[warned\] iteration 1: \d+% of the starting)"
        assert [line for line in said if not re.match(own, line)] == []


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_gives_the_same_run(
    config: Path, whole: Path, program: Program, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    [victim, *_] = sorted((run / "checkpoints/step_000004").glob("*.distcp"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    done = program("train", "--resume", config, f"runs={tmp_path}")
    assert str(victim) in done.stderr
    assert f"{run}: goes on after iteration 2 of 4" in done.stderr
    assert [line.split("/4")[0] for line in done.stdout.splitlines() if "/4" in line] == ["3", "4"]
    assert_equal(run, whole)


def test_resuming_a_finished_run_changes_nothing_and_another_configuration_is_refused(
    config: Path, whole: Path, program: Program, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    done = program("train", "--resume", config, f"runs={tmp_path}")
    assert f"{run}: finished: its 4 iterations are made" in done.stderr
    changed = {name for name, digest in digests(run).items() if digests(whole).get(name) != digest}
    assert changed == {"config.yaml", "log.txt"}  # the one names the folder of all runs
    assert len(digests(run)) == len(digests(whole))
    refused = program(
        "train", "--resume", config, f"runs={tmp_path}", "optimizer.lr=2e-3", expect=2
    )
    assert "optimizer.lr: there 0.001, here 0.002" in refused.stderr
    refused = program("train", config, f"runs={tmp_path}", expect=2)
    assert "pass --resume" in refused.stderr


def test_a_killed_warm_start_equals_one_that_was_not(
    task: Path, program: Program, tmp_path: Path
) -> None:
    config = task / "sft.yaml"
    config.write_text(SFT.format(task=task))
    whole, run = tmp_path / "whole/run", tmp_path / "killed/run"
    program("sft", config, f"runs={whole.parent}")
    lines = RunFolder(whole).read_metrics()
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    program("sft", config, f"runs={run.parent}", killed_at="update:8")
    assert metrics(run) == metrics(whole)[:3]
    rows = (task / "sft.jsonl").read_text()
    (task / "sft.jsonl").write_text(rows.replace("+", "-", 1))
    refused = program("sft", "--resume", config, f"runs={run.parent}", expect=2).stderr
    assert (
        f"data.path: {task}/sft.jsonl: not the rows that {run}/checkpoints/step_000004 was "
        "trained on"
    ) in refused
    (task / "sft.jsonl").write_text(rows)
    resumed = program("sft", "--resume", config, f"runs={run.parent}")
    assert f"{run}: goes on after update 4 of 8" in resumed.stderr
    assert metrics(run) == metrics(whole)
    assert digests(run / "model") == digests(whole / "model")


def test_a_warm_start_that_only_skips_updates_stops(
    task: Path, program: Program, tmp_path: Path
) -> None:
    config = task / "exploding.yaml"
    config.write_text(
        SFT.format(task=task).replace("schedule: cosine, warmup_updates: 3", "clip_grad: 0")
    )
    stopped = program(
        "sft", config, f"runs={tmp_path}", "optimizer.lr=1e30", "train.max_skipped=2", expect=2
    )
    lines = RunFolder(tmp_path / "run").read_metrics()
    last = lines[-1]["step"]
    assert (
        f"update {last}: the last 2 updates had a gradient that is not finite and were skipped"
    ) in stopped.stderr
    assert lines[-1]["skipped"] == 1
    assert last < 8


SCRIPTS = {
    "forks": {"name": "forks", "at": [2, 6, 12], "samples": 2, "tokens": 4, "opening": "=",
        "end": ";", "ended": "+"},
    "exits": {"name": "exits", "drawn": 2, "seed": 5, "tokens": 4, "opening": "="},
    "opened": {"name": "opened", "opening": "1+", "chance": 0.25},
    "budget": {"name": "budget", "most": 8, "end": ";", "cut": "=", "least": 4, "wait": "+"},
    "early_exit": {"name": "early_exit", "pauses": ["1", "2"], "probe": "=", "tokens": 3,
        "sure": 0.2, "exit": ";",
                   "end": "="},
}  # fmt: skip
ALWAYS = "forks"


@pytest.mark.parametrize(
    "kind", [ALWAYS, *(pytest.param(k, marks=pytest.mark.slow) for k in SCRIPTS if k != ALWAYS)]
)
def test_a_script_that_is_killed_is_made_again_bit_for_bit(
    kind: str, config: Path, program: Program, tmp_path: Path
) -> None:
    """Killed while responses are being made: two groups are in the journal, and the others were on
    their way.
    """
    method = f"method={json.dumps({'name': 'scripted', 'script': SCRIPTS[kind]})}"
    overrides = [method, "train.iterations=2", "train.updates=1", "checkpoint.every=1"]
    whole, run = tmp_path / "whole/run", tmp_path / "killed/run"
    program("train", config, *overrides, f"runs={whole.parent}")
    program("train", config, *overrides, f"runs={run.parent}", killed_at="rollout:2:2")
    *finished, torn = (run / "journal/step_000002.jsonl").read_bytes().split(b"\n")
    assert (len(finished), bool(torn)) == (2, True)
    program("train", "--resume", config, *overrides, f"runs={run.parent}")
    assert metrics(run) == metrics(whole)
    assert digests(run / "rollouts") == digests(whole / "rollouts")
    assert digests(run / "model") == digests(whole / "model")
    assert state(run, 2) == state(whole, 2)
    responses = [r for each in RunFolder(run).read_rollouts(2) for r in each.group.responses]
    _check_kind(kind, responses)


def _check_kind(kind: str, responses: list[Response]) -> None:
    """The script did what it is for: it wrote, or branched."""
    endings = {part.ending for response in responses for part in response.parts}
    if kind in ("opened", "budget"):
        assert ("chosen" if kind == "opened" else "forced") in endings
    else:
        assert any(response.branches for response in responses)


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_equal(
    config: Path, whole: Path, program: Program, tmp_path: Path
) -> None:
    """The kill comes when this machine's clock says so, within the time that four iterations
    take.
    """
    rng = random.Random(0)
    program("train", config, f"runs={tmp_path}", killed_at="rollout:1:1")
    for _ in range(6):
        program(
            "train",
            "--resume",
            config,
            f"runs={tmp_path}",
            killed_at=f"seconds:{rng.uniform(0, 3)}",
        )
    program("train", "--resume", config, f"runs={tmp_path}")
    assert_equal(tmp_path / "run", whole)
