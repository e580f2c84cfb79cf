"""`efr dpo` gives one process's numbers in every layout: the samples of a pair may lie on different
replicas.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_efr.data.arithmetic import ArithmeticTask, write
from megatron_efr.data.model_folder import ModelSize
from megatron_efr.run.folder import RunFolder
from tests.answers import write_answers
from tests.parallel.launch import run_ranks
from tests.parallel.layout import folder

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

LAYOUTS = ["tensor=2", "pipeline=2", "context=2", ""]
CONFIG = """
name: one
model: {{path: {task}/model, init: random}}
data: {{path: {path}}}
preference: {{beta: 0.2}}
optimizer: {{lr: 3e-3}}
train: {{updates: 3, batch: 4, log_every: 1, micro_batch_tokens: 150}}
observe: {{tensorboard: false}}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in each layout, and `one` in a single process."""
    place = tmp_path_factory.mktemp("preference")
    write(
        place, 0, ArithmeticTask(train_rows=4, test_rows=4, sft_rows=24, model=ModelSize(layers=4))
    )
    config = place / "dpo.yaml"
    config.write_text(
        CONFIG.format(task=place, path=write_answers(place, place / "answers.jsonl.zst"))
    )
    run_ranks(1, "tests.parallel.programs", "dpo", place / "one", f"{config} ")
    run_ranks(
        2, "tests.parallel.programs", "dpo", place, *(f"{config} {layout}" for layout in LAYOUTS)
    )
    return place


def measured(run: Path) -> list[dict[str, Any]]:
    return RunFolder(run).read_metrics()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_one_process(layout: str, runs: Path) -> None:
    found, wanted = measured(runs / folder(layout)), measured(runs / "one" / folder(""))
    assert len(found) == len(wanted) == 3
    assert wanted[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert wanted[-1]["loss"] < 0.69
    for mine, theirs in zip(found, wanted, strict=True):
        for key in ("loss", "margin", "gain", "gain_of_other", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key
