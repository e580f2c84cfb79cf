"""Checkpoints of one Megatron-Core under another: to the bit, or refused with a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from megatron.core.dist_checkpointing.strategies import common
from safetensors.torch import load_file

from megatron_efr import convert, inspect_checkpoint
from megatron_efr.checkpoint.checkpoints import Checkpoints
from megatron_efr.checkpoint.manifest import CheckpointError, verify
from megatron_efr.checkpoint.model_source import find_model
from megatron_efr.config import CheckpointConfig, ModelConfig
from megatron_efr.policy import Ranks
from tests.recorded import CHECKPOINTS, OPTIMIZERS, STEP, build, digest, held, update

OLD, NEW = CHECKPOINTS / "megatron-core-0.16.1", CHECKPOINTS / "megatron-core-0.19.2"
# the installed one has no file for what is common
READS_NEW = not hasattr(common, "TorchCommonLoadStrategy")


def recorded(place: Path, optimizer: str) -> dict[str, Any]:
    return json.loads((place / "recorded.json").read_text())[optimizer]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("written_by", [OLD, NEW], ids=lambda place: place.name)
def test_a_checkpoint_resumes_to_the_bit_and_goes_on(
    written_by: Path, optimizer: str, ranks: Ranks, tmp_path: Path
) -> None:
    """Loaded tensors are those that were saved, to the bit. The updates after it round as this
    machine's processor does.
    """
    if not (written_by / optimizer).is_dir():
        pytest.skip("recorded for the plain optimizer alone")
    shutil.copytree(written_by / optimizer, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", CheckpointConfig(), ranks)
    if written_by == NEW and not READS_NEW:
        before = sorted(tmp_path.rglob("*"))
        for ask in (checkpoints.newest, lambda: checkpoints.load(tmp_path / "run" / STEP, {})):
            with pytest.raises(
                CheckpointError, match=r"Python 3\.12 or 3\.13 .*; or begin anew .* megatron-to-hf"
            ):
                ask()
        assert sorted(tmp_path.rglob("*")) == before
        return
    policy, wanted = build(tmp_path / "model", ranks, optimizer), recorded(written_by, optimizer)
    path = checkpoints.newest()
    assert path is not None
    sharded, state = checkpoints.load(path, policy.sharded_state(loading=True))
    policy.load_sharded_state(sharded)
    policy.check_initial_model(state["initial_model"], str(path))
    assert held(policy) == {key: wanted[key] for key in ("weights", "optimizer")}
    for step in (3, 4):
        assert update(policy, step) == pytest.approx(wanted["figures"][step - 1], rel=1e-6)


@pytest.mark.parametrize("written_by", [OLD, NEW], ids=lambda place: place.name)
def test_weights_are_read_from_either_under_either(written_by: Path, tmp_path: Path) -> None:
    """By `efr convert`, `efr inspect` and `efr evaluate`, which need no Megatron for it."""
    checkpoint, wanted = written_by / "plain" / STEP, recorded(written_by, "plain")["weights"]
    template = written_by / "model"
    verify(checkpoint)
    convert.megatron_to_hf(checkpoint, tmp_path / "out", template)
    assert {
        name: digest(w) for name, w in load_file(tmp_path / "out/model.safetensors").items()
    } == wanted
    source = find_model(ModelConfig(path=str(checkpoint)), 0, str(template))
    assert {name: digest(w) for name, w in source.weights().items()} == wanted
    *lines, last = inspect_checkpoint.describe(checkpoint)
    assert lines[0].startswith("step 2, from ")
    assert f"Megatron-Core {'0.16' if written_by == OLD else '0.19'} or later" in last


@pytest.mark.skipif(READS_NEW, reason="the installed Megatron-Core reads them all")
def test_a_conversion_that_would_ask_megatron_is_refused_before_it_begins(tmp_path: Path) -> None:
    asked = [
        "megatron-to-hf",
        str(NEW / "plain" / STEP),
        str(tmp_path / "out"),
        "--template",
        str(NEW / "model"),
    ]
    with pytest.raises(CheckpointError, match=r"Megatron-Core 0\.19 or later"):
        convert.main([*asked, "--verify"])
    assert not (tmp_path / "out").exists()
    convert.main([*asked, "--verify-bytes"])
