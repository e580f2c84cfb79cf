"""The paper's offline baselines as programs: from kept answers, killed and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_efr.rollout.group_json import decode_graded
from megatron_efr.run.folder import RunFolder, read_groups
from tests.answers import write_answers
from tests.loop.conftest import Program, digests, metrics
from tests.loop.test_evaluate import CONFIG as EVALUATE

DPO = """
name: run
seed: 3
model: {{path: {task}/model, init: random}}
data: {{path: {path}}}
preference: {{beta: 0.2}}
optimizer: {{lr: 1e-3, schedule: cosine, warmup_updates: 3}}
train: {{updates: 8, batch: 4, bucket: 3, log_every: 2, micro_batch_tokens: 200}}
checkpoint: {{every: 4, keep: 2}}
observe: {{tensorboard: false}}
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(task: Path) -> Path:
    path = task / "dpo.yaml"
    path.write_text(DPO.format(task=task, path=write_answers(task, task / "answers.jsonl.zst")))
    return path


def test_a_killed_preference_run_equals_one_that_was_not(
    config: Path, program: Program, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole/run", tmp_path / "killed/run"
    program("dpo", config, f"runs={whole.parent}")
    lines = RunFolder(whole).read_metrics()
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    assert lines[-1]["preferred"] == 1.0
    program("dpo", config, f"runs={run.parent}", killed_at="update:8")
    assert metrics(run) == metrics(whole)[:3]
    resumed = program("dpo", "--resume", config, f"runs={run.parent}")
    assert f"{run}: goes on after update 4 of 8" in resumed.stdout + resumed.stderr
    assert metrics(run) == metrics(whole)
    assert digests(run / "model") == digests(whole / "model")


def test_an_evaluation_keeps_its_judged_answers(
    task: Path, program: Program, tmp_path: Path
) -> None:
    config = task / "kept.yaml"
    config.write_text(EVALUATE.format(task=task))
    program("evaluate", config, f"runs={tmp_path}", "evaluation.keep=true")
    groups = read_groups(tmp_path / "run/eval/model.jsonl.zst", decode_graded)
    assert len(groups) == 16
    assert all(len(group.grades) == len(group.group.responses) == 3 for group in groups)


def test_the_shortest_right_answers_are_learnt(
    config: Path, task: Path, program: Program, tmp_path: Path
) -> None:
    supervised = task / "shortest.yaml"
    supervised.write_text(config.read_text().replace("preference: {beta: 0.2}\n", ""))
    said = program("sft", supervised, f"runs={tmp_path}")
    assert "64 right answers to train on" in said.stdout
    lines = RunFolder(tmp_path / "run").read_metrics()
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
