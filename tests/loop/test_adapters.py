"""A run that trains low-rank adapters: it learns, goes on after a kill, and its checkpoint becomes
the two folders that it leaves.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_efr import convert
from megatron_efr.run.folder import RunFolder
from tests.loop.conftest import Program, digests, metrics

LORA = "model.lora={rank: 4, targets: [q_proj, v_proj, down_proj]}"


@pytest.mark.slow
def test_a_killed_run_with_adapters_equals_one_that_was_not(
    config: Path, program: Program, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole/run", tmp_path / "cut/run"
    program("train", config, LORA, f"runs={whole.parent}")
    program("train", config, LORA, f"runs={cut.parent}", killed_at="update:6")
    assert metrics(cut) == metrics(whole)[:2]
    program("train", "--resume", config, LORA, f"runs={cut.parent}")
    assert metrics(cut) == metrics(whole)
    for folder in ("model", "adapter", "rollouts"):
        assert digests(cut / folder) == digests(whole / folder)
    # it learns, and policy and engine agree although only the engine's weights are merged
    lines = RunFolder(whole).read_metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["grad_norm"] > 1e-3 and line["first_ratio_max"] == 1 for line in lines)
    assert lines[0]["kl"] == 0
    assert all(abs(line["kl"]) > 1e-7 for line in lines[1:])
    assert all(line["logprob_diff_max"] <= 1e-5 for line in lines)
    # the checkpoint, merged and as PEFT has it
    saved = whole / "checkpoints/step_000004"
    convert.main(["megatron-to-hf", str(saved), str(tmp_path / "merged"), "--verify"])
    merged, made = (
        load_file(place / "model.safetensors") for place in (tmp_path / "merged", whole / "model")
    )
    assert merged.keys() == made.keys()
    assert all(torch.allclose(merged[name], made[name], rtol=0, atol=1e-7) for name in made)
    convert.main(["megatron-to-peft", str(saved), str(tmp_path / "adapter")])
    assert digests(tmp_path / "adapter") == digests(whole / "adapter")
