"""Whole runs whose rollouts run ahead: partial and asynchronous at once, evaluated, killed and
resumed.
"""

from __future__ import annotations

from pathlib import Path

from megatron_efr.run.folder import RunFolder
from tests.loop.conftest import Program, state

CONFIG = """
name: run
seed: 3
model: {{path: {task}/model, init: random}}
data:
  datasets: [{{path: {task}/train.jsonl, difficulty: difficulty}}]
  prompt: {{template: "{{question}}"}}
rollout: {{prompts: 4, samples: 4, max_new_tokens: 40, slots: 6, partial: true, async: true, max_staleness: 2}}
method: {{name: typical}}
algorithm: {{beta: 0.01}}
optimizer: {{lr: 1e-3}}
train: {{iterations: 6}}
evaluation: {{datasets: [{{path: {task}/test.jsonl, limit: 4}}], every: 3, max_new_tokens: 24}}
checkpoint: {{every: 2}}
observe: {{tensorboard: false}}
"""


def test_a_run_ahead_of_its_policy_is_killed_and_loses_no_prompt(
    task: Path, program: Program, tmp_path: Path
) -> None:
    config, folder = task / "ahead.yaml", RunFolder(tmp_path / "run")
    config.write_text(CONFIG.format(task=task))
    # in iteration 4, whose successor is begun
    program("train", config, f"runs={tmp_path}", killed_at="update:8")
    held = state(folder.path, 2)["stream"]["in_flight"]
    assert len(held) == 6, "an iteration's prompts and half as many"
    program("train", "--resume", config, f"runs={tmp_path}")

    lines = folder.read_metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["first_ratio_max"] == 1 and line["first_kl_to_old"] == 0 for line in lines)
    assert all(0 <= line["staleness_mean"] <= line["staleness_max"] <= 2 for line in lines)
    assert max(line["staleness_max"] for line in lines) >= 1
    assert lines[0]["logprob_diff_max"] < 1e-5
    assert abs(lines[0]["importance_mean"] - 1) < 1e-5
    stale = [line["logprob_diff_lag1_mean"] for line in lines if "logprob_diff_lag1_mean" in line]
    assert stale
    assert all(difference > 1e-5 for difference in stale), (
        "another version's log-probs, and no difference"
    )
    assert [line["step"] for line in lines if "eval/accuracy" in line] == [3, 6]

    groups = [credited.group for step in range(1, 7) for credited in folder.read_rollouts(step)]
    assert all(len(group.responses) == 4 for group in groups)
    assert len({group.seed for group in groups}) == 24
    left = state(folder.path, 6)["stream"]
    assert left["next_index"] == 24 + len(left["in_flight"])
