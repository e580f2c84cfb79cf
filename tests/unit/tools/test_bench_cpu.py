"""tools/bench/cpu.py: a smoke run on a model and task of its own, and what it says when they are
missing.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

pytestmark = pytest.mark.alike

ROOT = Path(__file__).resolve().parents[3]
BENCH = [sys.executable, str(ROOT / "tools" / "bench" / "cpu.py")]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*BENCH, *arguments], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=300
    )


@pytest.mark.heavy
def test_smoke_run_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    make = [sys.executable, "-m", "megatron_efr.data.arithmetic", "--out", str(tmp_path)]
    subprocess.run(make, check=True, env=ENVIRONMENT, cwd=ROOT, capture_output=True)
    model = tmp_path / "model"
    torch.manual_seed(0)
    # as good as any: nothing is learnt
    Qwen2ForCausalLM(Qwen2Config.from_pretrained(model)).save_pretrained(model)
    figures = tmp_path / "figures.json"
    done = run(
        "--quick",
        "--model",
        str(model),
        "--train",
        str(tmp_path / "train.jsonl"),
        "--json",
        str(figures),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(figures.read_text())
    assert [row["name"].split()[0] for row in rows] == ["engine", "engine", "policy", "iteration"]
    assert all(row["ours"] > 0 for row in rows)
    assert all(row["ratio"] > 0 for row in rows[:3])
    # peaks of whole processes, and so torch's libraries at least
    assert all(rows[2][f"{side}_memory_mib"] > 100 for side in ("our", "their"))
    assert rows[3]["theirs"] is None
    assert "TRL not measured: give --trl-python" in done.stdout
    assert done.stdout.count("\n| ") == len(rows)


def test_missing_model_says_to_run_the_quickstart_first(tmp_path: Path) -> None:
    done = run("--model", str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert "nowhere: no model folder there" in done.stderr
    assert "launch/quickstart.sh" in done.stderr


def test_missing_problems_say_to_run_the_quickstart_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = run("--model", str(tmp_path), "--train", str(tmp_path / "nowhere.jsonl"))
    assert done.returncode == 1
    assert "nowhere.jsonl: no such file of problems" in done.stderr
    assert "launch/quickstart.sh" in done.stderr


def test_a_size_that_the_heads_do_not_divide_is_refused_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text('{"num_attention_heads": 9}')
    (tmp_path / "train.jsonl").write_text("")
    given = ["--model", str(tmp_path), "--train", str(tmp_path / "train.jsonl")]
    done = run(*given, "--sizes", "576x30", "64x3")
    assert done.returncode == 1
    assert done.stderr == "--sizes 64x3: the model's 9 heads do not divide 64\n"


def test_generate_does_not_end_at_the_models_own_token_where_lengths_are_equal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "bench"))
    engine = importlib.import_module("engine")
    # one row at a time; a response would end within 100 tokens with a chance of four in five
    _, equal = engine.measure(count=16, slots=1, max_new_tokens=4, equal_length=100, turns=1)
    assert equal.prompts == 4
    assert equal.transformers.lengths["p10"] == equal.transformers.lengths["longest"] == 100
