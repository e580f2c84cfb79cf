"""`efr train` with rollouts from a real SGLang server that it starts and ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from megatron_efr.data.arithmetic import ArithmeticTask, write
from megatron_efr.run.folder import RunFolder
from tests.engine.conftest import PYTHON

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Two iterations of the quickstart's configuration, from random weights, with an evaluation in
    the second.
    """
    place = tmp_path_factory.mktemp("train")
    return trained(place, quickstart(place))


def quickstart(place: Path, **model: Any) -> dict[str, Any]:
    """Configuration of that run, its task written to `place`; more of its `model` section."""
    write(place / "task", 0, ArithmeticTask(max_terms=3, train_rows=24, test_rows=16, sft_rows=64))
    config = yaml.safe_load((ROOT / "examples/quickstart/rl.yaml").read_text())
    config |= {
        "name": "sglang",
        "runs": str(place),
        "model": {"path": str(place / "task/model"), "init": "random", **model},
    }
    config["data"]["datasets"][0]["path"] = str(place / "task/train.jsonl")
    config["evaluation"]["datasets"][0]["path"] = str(place / "task/test.jsonl")
    config["evaluation"] |= {"every": 2, "max_new_tokens": 40}
    config["train"]["iterations"] = config["checkpoint"]["every"] = 2
    config["rollout"] |= {
        "engine": "sglang",
        "python": str(PYTHON),
        "prompts": 8,
        "samples": 4,
        "max_new_tokens": 40,
    }
    # without a GPU too, servers sleep while the policy trains
    config["rollout"]["placement"] = "colocated"
    return config


def trained(place: Path, config: dict[str, Any]) -> RunFolder:
    """The run of a configuration, in a process of its own; its `runs` is `place`."""
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "megatron_efr.train", str(place / "config.yaml")],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return RunFolder(place / config["name"])


def test_engine_and_policy_agree_in_every_iteration(run: RunFolder) -> None:
    lines = run.read_metrics()
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["first_ratio_max"] == 1
        assert 0 < line["logprob_diff_mean"] <= 1e-4
        assert line["logprob_diff_max"] <= 1e-4
        assert line["skipped"] == 0
    assert 0 <= lines[1]["eval/accuracy"] <= 1


def test_each_iteration_was_answered_by_the_weights_before_it(run: RunFolder) -> None:
    for step in (1, 2):
        responses = [
            response for each in run.read_rollouts(step) for response in each.group.responses
        ]
        assert len(responses) == 32
        assert {span.version for response in responses for span in response.versions} == {step - 1}


METHODS = {
    "told": {"name": "l1_exact", "shortest": 4, "longest": 20, "suffix": "={budget};"},
    "opened": {"name": "asrr", "opening": "1+1;", "tau": 0.25},
    "cut": {"name": "elastic", "thought": 8, "answer": 6, "end": ";", "cut": "="},
    "budgets": {"name": "anytime", "budgets": [4, 10, 20], "answers": 2, "answer_tokens": 4,
        "end": ";", "cut": "=",
                "ended": "="},
    "exits": {"name": "s_grpo", "exits": 3, "answer_tokens": 4, "end": ";", "stop": "="},
}  # fmt: skip
"""A method of every kind that asks for something of an engine."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", METHODS)
def test_every_kind_of_method_trains(kind: str, tmp_path: Path) -> None:
    """A model that has learnt nothing, of whose answers about half are right: any text with a low
    digit.
    """
    write(tmp_path / "task", 0, ArithmeticTask(max_terms=3, train_rows=24, test_rows=4, sft_rows=4))
    rows = [{"question": f"{n} + 1", "answer": "[0-2]"} for n in range(24)]
    (tmp_path / "digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, Any] = {
        "name": kind,
        "runs": str(tmp_path),
        "model": {"path": str(tmp_path / "task/model"), "init": "random"},
        "data": {"datasets": [{"path": str(tmp_path / "digits.jsonl")}],
            "prompt": {"template": "{question}"}},
        "rollout": {
            "engine": "sglang", "python": str(PYTHON), "prompts": 4, "samples": 4,
            "max_new_tokens": 24,
            "placement": "colocated",
        },
        "grading": {"verifier": "regex", "answer": "whole", "options": {"search": True},
            "workers": 1},
        "method": METHODS[kind],
        "optimizer": {"lr": 1e-3},
        "train": {"iterations": 2},
        "observe": {"tensorboard": False},
    }  # fmt: skip
    lines = trained(tmp_path, config).read_metrics()
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["first_ratio_max"] == pytest.approx(1, abs=1e-6)
        assert 0 < line["logprob_diff_max"] <= 1e-4
        assert line["grad_norm"] > 0
        assert ("branches/accuracy" in line) == (kind in ("budgets", "exits"))


@pytest.mark.slow
def test_servers_answer_with_adapters_merged(tmp_path: Path) -> None:
    """They know weights alone: those of the second iteration have the first's adapters in them."""
    config = quickstart(tmp_path, lora={"rank": 4})
    # every text with a low digit is right, so that a model that has learnt nothing learns
    config["grading"] = {
        "verifier": "regex", "answer": "whole", "options": {"search": True}, "workers": 1,
    }  # fmt: skip
    rows = [{"question": f"{n}+1", "answer": "[0-2]"} for n in range(24)]
    digits = tmp_path / "digits.jsonl"
    digits.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config["data"]["datasets"] = [{"path": str(digits)}]
    config["optimizer"] = {"lr": 1e-2}
    del config["evaluation"]
    run = trained(tmp_path, config)
    lines = run.read_metrics()
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["kl"] == 0
    assert lines[1]["kl"] > 1e-4, "the second's weights are others"
    for line in lines:
        assert line["first_ratio_max"] == 1
        assert line["grad_norm"] > 0
        assert 0 < line["logprob_diff_max"] <= 1e-4
    assert {path.name for path in (run.path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_nothing_of_the_servers_is_left_and_only_the_owner_reads_their_folder(
    run: RunFolder,
) -> None:
    folder = run.path / "engines"
    assert {path.name for path in folder.iterdir()} == {"engine-0.yaml", "engine-0.log"}
    assert folder.stat().st_mode & 0o077 == 0
    assert [
        p.pid
        for p in psutil.process_iter(["cmdline"])
        if str(folder) in " ".join(p.info["cmdline"] or [])
    ] == []
