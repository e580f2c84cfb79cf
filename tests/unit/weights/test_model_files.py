"""Model folders as downloads, copies and other programs leave them: each fault is a sentence that
names the file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM

from megatron_efr import convert
from megatron_efr.config import ConfigError
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import FolderWeights, as_folder, fingerprint, save_folder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def folder(tied_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tied_model, tmp_path / "copy"))


@pytest.fixture
def sharded(untied_model: Path, tmp_path: Path) -> Path:
    architecture = Architecture.from_folder(untied_model)
    save_folder(
        tmp_path / "many",
        FolderWeights(untied_model, architecture).items(),
        untied_model,
        shard_bytes=100_000,
    )
    return tmp_path / "many"


def open_weights(folder: Path) -> FolderWeights:
    return FolderWeights(folder, Architecture.from_folder(folder))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Write the folder's tensors again, edited."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def change_index(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index)
    (folder / INDEX).write_text(json.dumps(index))


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123\n"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda file: file.write_text(POINTER),
            "is a git-lfs pointer, not the weights; .*git lfs pull",
        ),
        (lambda file: file.write_bytes(b""), "is empty; fetch it again"),
        (
            lambda file: file.write_bytes(b"\x01\x02"),
            "is no safetensors file, or was cut off or damaged .2 bytes",
        ),
        (
            lambda file: file.write_bytes(file.read_bytes()[:-1000]),
            "is no safetensors file, or was cut off or damaged",
        ),
        (
            lambda file: file.write_bytes(file.read_bytes()[:100]),
            "is no safetensors file, or was cut off or damaged .100 bytes",
        ),
        (
            lambda file: file.write_bytes(b"\xff" * 4096),
            "is no safetensors file, or was cut off or damaged",
        ),
        (
            lambda file: file.write_text("<html>404</html>" * 99),
            "is no safetensors file, or was cut off or damaged",
        ),
    ],
)
def test_a_file_that_holds_no_weights(
    damage: Callable[[Path], Any], message: str, folder: Path, sharded: Path
) -> None:
    damage(folder / WEIGHTS)
    with pytest.raises(ConfigError, match=f"model.path: .*copy/model.safetensors {message}"):
        open_weights(folder)
    with pytest.raises(ConfigError, match=message):
        fingerprint(folder)
    shard = sorted(sharded.glob("*.safetensors"))[1]
    damage(shard)
    with pytest.raises(ConfigError, match=f"model.path: .*many/{shard.name} {message}"):
        open_weights(sharded)


def test_what_is_there_instead_is_named(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(
        ConfigError,
        match=r"neither .* found \(pytorch_model.bin is there: convert it to safetensors",
    ):
        open_weights(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "index.json: not valid JSON"),
        ("[]", "index.json: a JSON object is required, found list"),
        ("{}", "index.json: weight_map: an object of tensors and their files is required"),
        ('{"weight_map": ["a"]}', "index.json: weight_map: an object"),
        ('{"weight_map": {"a": 1}}', "index.json: weight_map: an object"),
        (
            '{"weight_map": {"a": "gone.safetensors"}}',
            "index.json names files that are not there: .*gone",
        ),
        (POINTER, "index.json: not valid JSON"),
        (b"\xff\xfe", "index.json: not valid JSON"),
    ],
)
def test_an_index_that_is_none(text: str | bytes, message: str, sharded: Path) -> None:
    (sharded / INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message):
        open_weights(sharded)


def test_an_index_that_names_the_wrong_shard(sharded: Path) -> None:
    def swap(index: dict[str, Any]) -> None:
        files = sorted(set(index["weight_map"].values()))
        index["weight_map"][EMBEDDING] = files[-1]

    change_index(sharded, swap)
    with pytest.raises(
        ConfigError,
        match=rf"says that model-.* holds {EMBEDDING}, which it does not; 1 of 51 tensors",
    ):
        open_weights(sharded)


def test_an_index_that_leaves_a_tensor_out_is_read_as_transformers_reads_it(
    sharded: Path, untied_model: Path
) -> None:
    change_index(sharded, lambda index: index["weight_map"].pop("model.norm.weight"))
    wanted = open_weights(untied_model)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in open_weights(sharded).items())
    model = Qwen2ForCausalLM.from_pretrained(sharded)
    assert torch.equal(model.model.norm.weight, wanted["model.norm.weight"])


def test_an_index_beside_a_single_file(sharded: Path, untied_model: Path) -> None:
    shutil.copy(untied_model / WEIGHTS, sharded)
    message = rf"holds model.safetensors, and beside it {INDEX}, which names model-00001-of-.*: one of them is left over"
    with pytest.raises(ConfigError, match=message):
        open_weights(sharded)
    for shard in sharded.glob("model-*.safetensors"):
        shard.unlink()
    with pytest.raises(ConfigError, match=message):
        open_weights(sharded)
    change_index(
        sharded, lambda index: index.update(weight_map=dict.fromkeys(index["weight_map"], WEIGHTS))
    )
    assert torch.equal(open_weights(sharded)[HEAD], open_weights(untied_model)[HEAD])


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.int64, "I64"),
    ],
)
def test_quantised_weights(dtype: torch.dtype, name: str, folder: Path) -> None:
    tensor = "model.layers.1.mlp.up_proj.weight"
    change(folder, lambda tensors: tensors.update({tensor: tensors[tensor].to(dtype)}))
    with pytest.raises(
        ConfigError, match=rf"{WEIGHTS}: {tensor} is stored as {name}; supported: F32, BF16, F16"
    ):
        open_weights(folder)
    raw = json.loads((folder / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "fp8"}
    }
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(
        ConfigError, match=r"config\.json: quantization_config: quantised weights are not read"
    ):
        open_weights(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(value: float, folder: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    change(folder, lambda tensors: tensors[name].view(-1)[3:5].copy_(torch.tensor([value, -value])))
    source = open_weights(folder)
    message = f"{WEIGHTS}: {name} holds numbers that are not finite"
    with pytest.raises(ConfigError, match=message):
        dict(source.items())
    with pytest.raises(ConfigError, match=message):
        as_folder(source, tmp_path / "place", folder)
    with pytest.raises(ConfigError, match=message):
        convert.hf_to_megatron(folder, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_large_finite_weights_are_read(folder: Path) -> None:
    change(folder, lambda tensors: tensors["model.norm.weight"].fill_(3e38))
    assert float(open_weights(folder)["model.norm.weight"].max()) == pytest.approx(3e38)


def test_a_tied_model_with_a_head_of_its_own(folder: Path, tmp_path: Path) -> None:
    change(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert HEAD not in dict(open_weights(folder).items())  # the same a second time changes nothing
    change(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].to(torch.bfloat16)}))
    message = (
        rf"{WEIGHTS}: {HEAD} is not {EMBEDDING}, and config.json says tie_word_embeddings: true"
    )
    with pytest.raises(ConfigError, match=message):
        open_weights(folder)
    change(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING][:-1].clone()}))
    with pytest.raises(ConfigError, match=message):
        open_weights(folder)

    def last_bit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][-1, -1] *= 1.001

    change(folder, last_bit)
    with pytest.raises(ConfigError, match=message):
        open_weights(folder)
    with pytest.raises(ConfigError, match=message):
        convert.hf_to_megatron(folder, tmp_path / "megatron")
    raw = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(raw))
    assert HEAD in dict(open_weights(folder).items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"null", "config.json: a JSON object is required, found NoneType"),
        (b"[]", "config.json: a JSON object is required, found list"),
        (b"\xff\xfe{}", "config.json: not valid JSON"),
        (b"[" * 100_000, "config.json: not valid JSON"),
        (b"{}", "config.json: model_type None is not supported"),
    ],
)
def test_a_configuration_that_is_none(text: bytes, message: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        Architecture.from_folder(folder)
