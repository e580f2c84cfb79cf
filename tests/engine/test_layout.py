"""The table of SGLang's fused parameters against what SGLang's own loaders make of whole tensors,
without a server.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_efr.publication.sglang_layout import EngineLayout
from megatron_efr.rollout.servers.launcher import server_environment
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import FolderWeights
from tests.engine.conftest import PYTHON
from tests.families import make_family_folder

RANKS = 4
MODELS = {
    "qwen2": {},  # 2 KV heads, which pairs of ranks share; biases; a vocabulary of 61; tied
    "qwen3-tied": {},  # 1 KV head
    # 192 rows for 4 ranks; a head of its own
    "llama": {"num_key_value_heads": 4, "vocab_size": 150},
    "qwen3-moe": {},  # experts of 48 columns, widened to 128: 32, 16 and none are the ranks' own
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {
        family: make_family_folder(place / family, family, **changes)
        for family, changes in MODELS.items()
    }


@pytest.fixture(scope="module")
def held(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    if not os.access(PYTHON, os.X_OK):
        pytest.skip(f"{PYTHON} is not there: bash tools/setup_sglang_cpu.sh makes it")
    out = tmp_path_factory.mktemp("loaded") / "parameters.safetensors"
    command = [
        PYTHON,
        "-I",
        Path(__file__).with_name("loaded.py"),
        str(RANKS),
        out,
        *folders.values(),
    ]
    done = subprocess.run(
        command,
        env=server_environment(os.environ, on_gpu=False, tp=1),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return load_file(out)


@pytest.mark.parametrize("family", MODELS)
def test_each_rank_holds_what_the_table_says(
    family: str, folders: dict[str, Path], held: dict[str, torch.Tensor]
) -> None:
    architecture = Architecture.from_folder(folders[family])
    layout, tensors = (
        EngineLayout(architecture, RANKS),
        list(FolderWeights(folders[family], architecture).items()),
    )
    parts: dict[str, dict[int, list[torch.Tensor]]] = {}
    for name, tensor in tensors:
        if (part := layout.expert_part(name, tensor)) is not None:
            parts.setdefault(part.target, {})[part.place] = part.slices
    slices = dict(layout.slices(tensors))
    for target, placed in parts.items():
        each = [
            torch.cat([placed[place][rank] for place in sorted(placed)]) for rank in range(RANKS)
        ]
        slices[target] = [
            whole.reshape(held[f"{family}/{rank}/{target}"].shape)
            for rank, whole in enumerate(each)
        ]
    ours = {
        f"{family}/{rank}/{name}": part
        for name, found in slices.items()
        for rank, part in enumerate(found)
    }
    assert ours.keys() == {key for key in held if key.startswith(f"{family}/")}
    for key, part in ours.items():
        assert torch.equal(part, held[key]), key
