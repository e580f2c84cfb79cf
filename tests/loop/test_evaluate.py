"""An evaluation that is killed and begun again goes on where it was, and its record is that of a
whole one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_efr.rollout.journal import Journal
from tests.loop.conftest import Program

CONFIG = """
name: run
seed: 3
model: {{path: {task}/model, init: random}}
prompt: {{template: "{{question}}"}}
evaluation:
  datasets: [{{path: {task}/test.jsonl, difficulty: difficulty}}]
  preset: r1
  samples: 3
  max_new_tokens: 24
rollout: {{slots: 5}}
"""


@pytest.fixture(scope="module")
def config(task: Path) -> Path:
    path = task / "evaluate.yaml"
    path.write_text(CONFIG.format(task=task))
    return path


def test_a_record_is_not_made_twice_nor_lost_to_another_evaluation(
    config: Path, program: Program, tmp_path: Path
) -> None:
    runs, path = f"runs={tmp_path}", tmp_path / "run/eval/model.json"
    figures = program("evaluate", config, runs).stdout.partition("model:\n")[2]
    before = path.read_bytes()
    again = program("evaluate", config, runs, "rollout.slots=64").stdout
    assert again == (
        f"{path}: holds this evaluation already; delete it to evaluate again\nmodel:\n{figures}"
    )
    refused = program("evaluate", config, runs, "grading.verifier=exact", expect=2).stderr
    assert (
        f"{path}: is the record of another evaluation than this; it differs in\n  grading of test: "
    ) in refused
    assert path.read_bytes() == before
    program("evaluate", config, runs, "evaluation.samples=1", "--replace")
    assert path.read_bytes() != before
    assert not list((path.parent / "unfinished").iterdir())


def test_killed_twice_and_resumed_it_is_the_whole_one_bit_for_bit(
    config: Path, program: Program, tmp_path: Path
) -> None:
    program("evaluate", config, f"runs={tmp_path / 'whole'}")
    runs, place = f"runs={tmp_path / 'killed'}", tmp_path / "killed/run/eval"
    program("evaluate", config, runs, killed_at="answer:5")
    program("evaluate", config, runs, killed_at="answer:11")
    held = Journal(place / "unfinished/model.jsonl").read()
    assert (len(held.groups), held.torn) == (11, 1)
    assert not (place / "model.json").exists()
    refused = program(
        "evaluate", config, runs, "seed=4", "evaluation.max_new_tokens=20", expect=2
    ).stderr
    assert (
        "eval/unfinished/model.jsonl: holds answers of another evaluation, which was not finished"
    ) in refused
    assert "  model: there " in refused, "random weights are drawn from the seed"
    assert "  seed: there 3, here 4" in refused
    assert "  max_new_tokens: there 24, here 20" in refused
    assert "temperature" not in refused
    resumed = program("evaluate", config, runs, "rollout.slots=64")
    assert "model: 11 of 16 problems were answered before" in resumed.stdout
    assert (place / "model.json").read_bytes() == (
        tmp_path / "whole/run/eval/model.json"
    ).read_bytes()
    assert not list((place / "unfinished").iterdir())
