"""Model folders spoilt at random, from a fixed seed: each is read, or refused in a sentence that
names the file.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from megatron_efr.data.byte_model import BYTE_MODEL, byte_tokenizer
from megatron_efr.data.model_folder import write_model_folder
from megatron_efr.data.prompts import load_tokenizer
from megatron_efr.data.stop_tokens import stop_ids
from megatron_efr.errors import UserError
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import FolderWeights, RandomWeights, fingerprint, save_folder

INPUTS = 200
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 10**30, 0.5, -0.0, 1e-300, float("nan"), float("inf"), "", "2",
    "false", "yarn",
    [], [1], [[2]], ["full_attention"], {}, {"a": 1}, {"rope_type": "yarn"},
    {"rope_type": "yarn", "factor": "4"},
    {"rope_type": {}, "rope_theta": []}, {"rope_type": "llama3", "factor": 8},
    {"type": "linear", "factor": 2},
]  # fmt: skip
EXTRA = [
    "rope_scaling",
    "rope_theta",
    "is_causal",
    "quantization_config",
    "head_dim",
    "layer_types",
    "sliding_window",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fuzzed")
    write_model_folder(place / "template", byte_tokenizer(), BYTE_MODEL)
    weights = RandomWeights(Architecture.from_folder(place / "template"), seed=0)
    save_folder(place / "whole", weights.items(), place / "template")
    save_folder(place / "many", weights.items(), place / "template", shard_bytes=200_000)
    return place


def read(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Everything that a program reads of a model folder before work; what it says, if it
    refuses.
    """
    try:
        architecture = Architecture.from_folder(folder)
        stop_ids(folder, tokenizer)
        dict(FolderWeights(folder, architecture).items())
        fingerprint(folder)
    except UserError as error:
        return str(error)
    return None


def spoilt_text(text: str, rng: random.Random) -> bytes:
    """JSON with a value replaced, added or taken out, or text that is cut, or holds other bytes."""
    raw = json.loads(text)
    keys = list(raw)
    match rng.randrange(8):
        case 0 | 1 | 2 | 3:
            raw[rng.choice(keys)] = rng.choice(VALUES)
        case 4:
            raw[rng.choice(EXTRA)] = rng.choice(VALUES)
        case 5:
            del raw[rng.choice(keys)]
        case 6:
            return text.encode()[: rng.randrange(len(text))]
        case _:
            return text.encode().replace(
                rng.choice([b":", b'"', b"}"]), rng.choice([b"\xff", b"", b"[", b"\x00"]), 1
            )
    return json.dumps(raw).encode()


def spoilt_bytes(data: bytes, rng: random.Random) -> bytes:
    """Weights that were cut, or hold other bytes, in the header mostly."""
    if rng.random() < 0.3:
        return data[: int(len(data) * rng.random() ** 3)]
    spoilt, header = bytearray(data), 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.randrange(1, 4)):
        spoilt[rng.randrange(8 if rng.random() < 0.2 else header)] = rng.randrange(256)
    return bytes(spoilt)


@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "model.safetensors.index.json", "weights"]
)
def test_no_input_ends_in_a_traceback(file: str, whole: Path, tmp_path: Path) -> None:
    rng, refused, tokenizer = random.Random(file), 0, load_tokenizer(whole / "whole")
    folder = tmp_path / "folder"
    shutil.copytree(whole / ("many" if "index" in file else "whole"), folder)
    path = folder / ("model.safetensors" if file == "weights" else file)
    data = path.read_bytes()
    for _ in range(INPUTS):
        path.write_bytes(
            spoilt_bytes(data, rng) if file == "weights" else spoilt_text(data.decode(), rng)
        )
        said = read(folder, tokenizer)
        refused += said is not None
        assert said is None or str(folder) in said, said
    assert refused >= INPUTS // 4
