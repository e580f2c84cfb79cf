"""tools/bench/servers.py: the embedded engine beside a server of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_efr.data.arithmetic import ArithmeticTask, write
from tests.engine.conftest import PYTHON

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_both_engines_answer_the_same_prompts_at_their_own_and_at_one_length(
    tmp_path: Path,
) -> None:
    if not os.access(PYTHON, os.X_OK):
        pytest.skip(f"{PYTHON} is not there: bash tools/setup_sglang_cpu.sh makes it")
    write(tmp_path, 0, ArithmeticTask(train_rows=1, test_rows=1, sft_rows=1))
    model, prompts = tmp_path / "model", tmp_path / "prompts.jsonl"
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config.from_pretrained(model)).save_pretrained(model)
    prompts.write_text("".join(json.dumps({"tokens": [3, 4, 5 + i]}) + "\n" for i in range(8)))
    options = {
        "model": model,
        "prompts": prompts,
        "python": PYTHON,
        "slots": 4,
        "turns": 1,
        "max-new-tokens": 20,
        "equal-length": 12,
    }
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "tools/bench/servers.py", *given],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = done.stdout.splitlines()[2:]
    own, equal = ([cell.strip() for cell in row.split("|")] for row in rows)
    assert own[1] == "own lengths, 8 prompts"
    assert equal[1:3] == ["12 tokens each, 4 prompts", "12.0 / 12.0"]
    for row in (own, equal):
        ours, theirs = (float(cell.replace(",", "")) for cell in row[3:5])
        ratio = float(row[5].removesuffix("x"))
        assert ratio == pytest.approx(ours / theirs, rel=0.05)
