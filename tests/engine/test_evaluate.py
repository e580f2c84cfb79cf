"""`efr evaluate --engine sglang`, from a Megatron checkpoint and killed on its way: the embedded
engine's record.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_efr.convert import hf_to_megatron
from megatron_efr.data.arithmetic import ArithmeticTask, write
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import RandomWeights, save_folder
from tests.engine.conftest import PYTHON

KILLED = Path(__file__).parents[1] / "loop/killed.py"
PROBLEMS = 16


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Greedy answers of a Megatron checkpoint, whose weights no Hugging Face folder holds."""
    if not os.access(PYTHON, os.X_OK):
        pytest.skip(f"{PYTHON} is not there: bash tools/setup_sglang_cpu.sh makes it")
    place = tmp_path_factory.mktemp("evaluate")
    write(
        place / "task",
        0,
        ArithmeticTask(max_terms=3, train_rows=24, test_rows=PROBLEMS, sft_rows=64),
    )
    weights = RandomWeights(Architecture.from_folder(place / "task/model"), seed=7)
    save_folder(
        place / "drawn",
        ((n, t * (1 if t.dim() == 1 else 8)) for n, t in weights.items()),
        place / "task/model",
    )
    hf_to_megatron(place / "drawn", place / "megatron")
    path = place / "config.yaml"
    tree: dict[str, Any] = {
        "name": "run",
        "runs": str(place),
        "model": {"path": str(place / "megatron")},
        "prompt": {"template": "{question}"},
        "evaluation": {
            "datasets": [{"path": str(place / "task/test.jsonl"), "difficulty": "difficulty"}],
            "preset": "custom",
            "temperature": 0.0,
            "max_new_tokens": 40,
        },
        "rollout": {"python": str(PYTHON), "engines": 2, "slots": 4},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def evaluate(config: Path, record: str, *options: str, at: str | None = None, ends: int = 0) -> str:
    """Output of the program; `at` is a moment of killed.py's."""
    start = ["-m", "megatron_efr.evaluate"] if at is None else [str(KILLED), at, "evaluate"]
    command = [sys.executable, *start, str(config), "--record", record, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == ends, done.stdout + done.stderr
    return done.stdout + done.stderr


def recorded(config: Path, name: str) -> dict[str, Any]:
    """The figures and answers of a record, whoever was asked."""
    record = json.loads((config.parent / f"run/eval/{name}.json").read_text())
    del record["asked"]
    return record


@pytest.fixture(scope="module")
def embedded(config: Path) -> dict[str, Any]:
    """The embedded engine's record."""
    evaluate(config, "embedded")
    return recorded(config, "embedded")


def test_two_servers_answer_a_checkpoint_as_the_embedded_engine_does_though_killed_between(
    config: Path, embedded: dict[str, Any]
) -> None:
    """Its weights come within the requests first, and then by a folder, of which nothing is
    left.
    """
    evaluate(
        config,
        "served",
        "--engine=sglang",
        "rollout.transport=tensor",
        at="answer:6",
        ends=-signal.SIGKILL,
    )
    logs = [(config.parent / f"run/engines/eval-served/engine-{i}.log").read_text() for i in (0, 1)]
    assert all("Decode batch" in log or "Prefill batch" in log for log in logs), (
        "both servers were asked"
    )
    printed = evaluate(config, "served", "--engine=sglang", "rollout.engines=1")
    assert f"served: 6 of {PROBLEMS} problems were answered before" in printed
    assert len({row["responses"][0] for row in embedded["rows"]}) > PROBLEMS / 2, (
        "answers differ from one another"
    )
    assert recorded(config, "served") == embedded | {"name": "served"}
    assert not (config.parent / "run/engines/eval-served/weights").exists()


@pytest.mark.slow
def test_a_server_that_dies_is_started_again_reads_its_model_folder_again_and_answers_the_rest(
    config: Path, embedded: dict[str, Any]
) -> None:
    folder = config.parent / "drawn"
    options = [
        "--engine=sglang",
        f"model.path={folder}",
        "rollout.engines=1",
        "rollout.timeouts={check_s: 0.5}",
    ]
    said = evaluate(config, "struck", *options, at="servers:6")
    assert "none of 1 servers is left that serves version 0: http://" in said
    assert "engine-0 is back" in said
    answered = re.findall(rf"struck: (\d+) of {PROBLEMS} problems were answered before", said)
    assert len(answered) == 1
    assert 6 <= int(answered[0]) < PROBLEMS
    assert recorded(config, "struck") == embedded | {"name": "struck"}
    assert (folder / "model.safetensors").exists(), "what was read is left alone"
