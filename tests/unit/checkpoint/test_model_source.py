"""A model is found in a Hugging Face folder, in a Megatron checkpoint and in a run, or it is said
what is missing.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_efr.checkpoint.checkpoints import Checkpoints
from megatron_efr.checkpoint.manifest import CheckpointError
from megatron_efr.checkpoint.model_source import ModelSource, find_model
from megatron_efr.config import CheckpointConfig, ModelConfig
from megatron_efr.convert import hf_to_megatron, megatron_to_hf
from megatron_efr.errors import UserError
from megatron_efr.policy import Ranks
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import FolderWeights
from tests.policies import make_policy


@pytest.fixture(scope="module")
def run(tied_model: Path, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a checkpoint of a policy that still has the weights of `tied_model`."""
    folder = tmp_path_factory.mktemp("run")
    policy = make_policy(tied_model, ranks)
    state = {"step": 3, "initial_model": policy.initial_model}
    Checkpoints(folder / "checkpoints", CheckpointConfig(), ranks).save(
        3, policy.sharded_state(), state
    )
    return folder


def find(path: Path, template: Path | None = None, seed: int = 0, **changes: Any) -> ModelSource:
    return find_model(ModelConfig(path=str(path), **changes), seed, template and str(template))


def assert_same_weights(found: ModelSource, folder: Path) -> None:
    there = dict(found.weights().items())
    wanted = FolderWeights(folder, Architecture.from_folder(folder))
    assert there.keys() == wanted.shapes.keys()
    assert all(torch.equal(there[name], wanted[name]) for name in there)


@pytest.mark.parametrize("named", ["", "checkpoints", "checkpoints/step_000003"])
def test_a_run_its_checkpoints_and_one_of_them_have_the_policys_weights(
    named: str, run: Path, tied_model: Path
) -> None:
    found = find(run / named)
    assert (found.start.path, found.checkpoint) == (
        str(tied_model),
        run / "checkpoints/step_000003",
    )
    assert_same_weights(found, tied_model)


def test_a_converted_checkpoint_brings_its_own_configuration(
    tied_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tied_model, tmp_path / "model"))
    hf_to_megatron(model, tmp_path / "megatron")
    shutil.rmtree(model)
    assert_same_weights(find(tmp_path / "megatron"), tied_model)


def test_a_hugging_face_folder_is_itself(tied_model: Path) -> None:
    assert find(tied_model).checkpoint is None
    assert_same_weights(find(tied_model), tied_model)


def test_the_fingerprint_tells_models_and_drawn_weights_apart(
    run: Path, tied_model: Path, untied_model: Path
) -> None:
    found = [find(path).fingerprint() for path in (run, tied_model, untied_model)]
    found += [find(tied_model, seed=seed, init="random").fingerprint() for seed in (0, 1)]
    assert len(set(found)) == 5
    assert [find(path, seed=1).fingerprint() for path in (run, tied_model)] == found[:2], (
        "the seed draws nothing here"
    )


def test_what_a_checkpoint_lacks_is_named(run: Path, tied_model: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(run / "checkpoints/step_000003", tmp_path / "step"))
    state = (checkpoint / "state.json").read_text()
    (checkpoint / "state.json").write_text(state.replace(str(tied_model), "/gone"))
    with pytest.raises(
        UserError, match=r"step: was trained from /gone, which is not there; .* template=FOLDER"
    ):
        find(checkpoint)
    with pytest.raises(CheckpointError, match=r"state.json: .* bytes, .* were written"):
        find(checkpoint, tied_model).weights()
    (checkpoint / "state.json").write_text(state)
    assert_same_weights(find(checkpoint, tied_model), tied_model)
    (checkpoint / "state.json").unlink()
    with pytest.raises(UserError, match=r"step: no state.json and no hugging_face/"):
        find(checkpoint)


def test_a_run_without_a_checkpoint_says_so_and_names_those_that_verify(
    run: Path, tmp_path: Path
) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text("name: begun\n")
    none = r"begun: a run that has no checkpoint yet, and so no model; .*begun/checkpoints holds none that verifies\n"
    with pytest.raises(UserError, match=none):
        find(begun)
    with pytest.raises(UserError, match=none):
        megatron_to_hf(begun, tmp_path / "made")
    torn = Path(
        shutil.copytree(run / "checkpoints/step_000003", begun / "checkpoints/step_000004.partial")
    )
    (torn / "manifest.json").unlink()
    for named in (begun, begun / "checkpoints"):
        with pytest.raises(
            UserError,
            match=r"no checkpoint yet.*\n  .*step_000004.partial: no manifest.json: the save was",
        ):
            find(named)
    whole = shutil.copytree(run / "checkpoints/step_000003", begun / "checkpoints/step_000003")
    with pytest.raises(UserError, match=rf"the newest that verifies is {whole}: name that one"):
        find(begun)
    (begun / "checkpoints/latest").write_text("step_000007")
    with pytest.raises(
        UserError,
        match=rf"latest: names 'step_000007', which is no checkpoint there; .* {whole}: name",
    ):
        find(begun)
    shutil.rmtree(begun / "checkpoints")
    (begun / "model").mkdir()
    (begun / "model/config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"none of its checkpoints is left; its model is .*begun/model"
    ):
        find(begun)
