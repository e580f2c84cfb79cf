"""Model folders that cannot be used, by hand: each is refused in a sentence that names the file and
the key.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_efr.data.byte_model import BYTE_MODEL, byte_tokenizer
from megatron_efr.data.model_folder import write_model_folder
from megatron_efr.data.prompts import load_tokenizer
from megatron_efr.data.stop_tokens import stop_ids
from megatron_efr.errors import UserError
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import FolderWeights, RandomWeights, fingerprint, save_folder

pytestmark = pytest.mark.alike

CONFIG, GENERATION, WEIGHTS = "config.json", "generation_config.json", "model.safetensors"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
GONE = object()
COUNTS, AN_ID = (
    "an integer is required, found ",
    "a token id, or a list of them, is required, found ",
)

KEYS: list[tuple[str, str, Any, str]] = [
    (CONFIG, "model_type", "gpt2", "model_type 'gpt2' is not supported; supported: qwen2"),
    (CONFIG, "model_type", GONE, "model_type None is not supported"),
    (CONFIG, "hidden_size", GONE, f"hidden_size: {COUNTS}None; it counts from 1"),
    (CONFIG, "hidden_size", "64", f"hidden_size: {COUNTS}'64'"),
    (CONFIG, "hidden_size", 0, f"hidden_size: {COUNTS}0"),
    (CONFIG, "hidden_size", 63.5, f"hidden_size: {COUNTS}63.5"),
    (CONFIG, "hidden_size", True, f"hidden_size: {COUNTS}True"),
    (CONFIG, "hidden_size", 10**12, "hidden_size: 1000000000000 is more than any model has"),
    (CONFIG, "hidden_size", 65, "hidden_size: 65 does not divide by num_attention_heads 4"),
    (CONFIG, "num_hidden_layers", [3], f"num_hidden_layers: {COUNTS}[3]"),
    (CONFIG, "num_hidden_layers", 3, "the tensors are not those of its config.json; "
        "missing model.layers.2.input"),
    (CONFIG, "num_hidden_layers", 1, "the tensors are not those of its config.json; missing "
        "none, unexpected model."),
    (CONFIG, "num_attention_heads", 5, "hidden_size: 64 does not divide by num_attention_heads 5"),
    (CONFIG, "num_key_value_heads", 3, "num_key_value_heads: 3 does not divide "
        "num_attention_heads 4"),
    (CONFIG, "num_key_value_heads", 8, "num_key_value_heads: 8 does not divide "
        "num_attention_heads 4"),
    (CONFIG, "intermediate_size", 191, "gate_proj.weight is (192, 64), config.json "
        "makes it (191, 64)"),
    (CONFIG, "vocab_size", GONE, "vocab_size is None, expected a positive integer"),
    (CONFIG, "vocab_size", "x", "vocab_size is 'x', expected a positive integer"),
    (CONFIG, "vocab_size", 3, "vocabulary mismatch: the tokenizer's token "
        "'<assistant>' has id 261"),
    (CONFIG, "vocab_size", 300, "model.embed_tokens.weight is (272, 64), config.json "
        "makes it (300, 64)"),
    (CONFIG, "rms_norm_eps", 0, "rms_norm_eps: a number above 0 is required, found 0"),
    (CONFIG, "rms_norm_eps", float("nan"), "rms_norm_eps: a number above 0 is required, found nan"),
    (CONFIG, "max_position_embeddings", 1.5, f"max_position_embeddings: {COUNTS}1.5"),
    (CONFIG, "tie_word_embeddings", False,
        "the tensors are not those of its config.json; missing lm_head.weight"),
    (CONFIG, "tie_word_embeddings", "true",
        "tie_word_embeddings: true or false is required, found 'true'"),
    (CONFIG, "hidden_act", "gelu", "hidden_act 'gelu' is not supported; supported: \"silu\""),
    (CONFIG, "attention_bias", "no", "attention_bias 'no' is not supported; supported: true"),
    (CONFIG, "mlp_bias", True, "mlp_bias True is not supported; supported: false"),
    (CONFIG, "head_dim", 7, "head_dim: 7: rotary embeddings need an even one"),
    (CONFIG, "use_sliding_window", True, "use_sliding_window True is not supported"),
    (CONFIG, "layer_types", 3, "layer_types: a list is required, found 3"),
    (CONFIG, "layer_types", ["sliding_attention"] * 2,
        "layer_types: sliding-window attention is not supported"),
    (CONFIG, "rope_parameters", [1], "rope_parameters: an object or null is required, found [1]"),
    (CONFIG, "rope_parameters", {"rope_type": "dynamic"},
        "rope_parameters.rope_type: 'dynamic' is not supported"),
    (CONFIG, "rope_parameters", {"rope_type": "yarn"},
        "rope_parameters.factor: a number above 0 is required"),
    (CONFIG, "rope_parameters", {"rope_theta": "1e4"},
        "rope_parameters.rope_theta: a number above 1 is required"),
    (CONFIG, "rope_scaling", {"type": "linear"},
        "rope_scaling.factor: a number above 0 is required, found None"),
    (CONFIG, "rope_scaling", {"rope_type": "longrope", "factor": 2},
        "rope_scaling.rope_type: 'longrope' is not"),
    (CONFIG, "quantization_config", {"quant_method": "fp8"},
        "quantization_config: quantised weights "
        "are not read"),
    (CONFIG, "eos_token_id", 2.5, f"eos_token_id: {AN_ID}2.5"),
    (CONFIG, "eos_token_id", 10**6, "vocabulary mismatch: eos token ids [1000000] "
        "are outside vocab_size 272"),
    (GENERATION, "eos_token_id", "</s>", f"eos_token_id: {AN_ID}'</s>'"),
    (GENERATION, "eos_token_id", -1, "vocabulary mismatch: eos token ids [-1] are "
        "outside vocab_size 272"),
    (GENERATION, "eos_token_id", {"a": 1}, f"eos_token_id: {AN_ID}{{'a': 1}}"),
    (GENERATION, "eos_token_id", [[1]], f"eos_token_id: {AN_ID}[[1]]"),
    (GENERATION, "eos_token_id", True, f"eos_token_id: {AN_ID}True"),
]  # fmt: skip

POINTER = b"version https://git-lfs.github.com/spec/v1\n"
FILES: list[tuple[str, bytes | None, str]] = [
    *((name, b"", "not valid JSON: Expecting "
        "value") for name in (CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG)),
    *((name, b"[]", "a JSON object is required, "
        "found list") for name in (CONFIG, GENERATION, TOKENIZER)),
    *((name, b"[" * 100_000, "not valid JSON") for name in (CONFIG, GENERATION, TOKENIZER,
        TOKENIZER_CONFIG)),
    (CONFIG, b'{"model_type": ', "not valid JSON"),
    (GENERATION, "{}".encode("utf-16"), "not valid JSON: 'utf-8' codec can't decode byte 0xff"),
    (TOKENIZER, b"<!DOCTYPE html>", "not valid JSON"),
    (TOKENIZER, POINTER, "not valid JSON"),
    (TOKENIZER, b"{}", "the tokenizer's files cannot be loaded"),
    (TOKENIZER_CONFIG, b"null", "a JSON object is required, found NoneType"),
    (TOKENIZER, None, "no tokenizer here (expected tokenizer.json and tokenizer_config.json)"),
    (CONFIG, None, "no such file; a model folder has a config.json"),
    (WEIGHTS, None, "neither model.safetensors nor model.safetensors.index.json found"),
    (WEIGHTS, POINTER, "is a git-lfs pointer"),
    (WEIGHTS, b"", "is empty; fetch it again"),
    (WEIGHTS, b"<html>404</html>", "is no safetensors file, or was cut off or damaged"),
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("by_hand")
    write_model_folder(place / "template", byte_tokenizer(), BYTE_MODEL)
    weights = RandomWeights(Architecture.from_folder(place / "template"), seed=0)
    save_folder(place / "whole", weights.items(), place / "template")
    return place / "whole"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def read(folder: Path) -> None:
    """Everything that a program reads of a model folder before work."""
    tokenizer, architecture = load_tokenizer(folder), Architecture.from_folder(folder)
    stop_ids(folder, tokenizer)
    dict(FolderWeights(folder, architecture).items())
    fingerprint(folder)


def refused(folder: Path, edit: Callable[[], object]) -> str:
    read(folder)
    edit()
    with pytest.raises(UserError) as caught:
        read(folder)
    return str(caught.value)


@pytest.mark.parametrize(("file", "key", "value", "words"), KEYS)
def test_a_value_that_is_none_of_a_model(
    file: str, key: str, value: Any, words: str, folder: Path
) -> None:
    raw = json.loads((folder / file).read_text())
    raw.pop(key, None)
    if value is not GONE:
        raw[key] = value
    said = refused(folder, lambda: (folder / file).write_text(json.dumps(raw)))
    assert words in said
    assert str(folder) in said


@pytest.mark.parametrize(("file", "content", "words"), FILES)
def test_a_file_that_is_none_of_a_model(
    file: str, content: bytes | None, words: str, folder: Path
) -> None:
    said = refused(
        folder,
        (folder / file).unlink if content is None else lambda: (folder / file).write_bytes(content),
    )
    assert words in said
    assert str(folder / file if file in (CONFIG, GENERATION) or "JSON" in words else folder) in said


def test_there_are_sixty_by_hand() -> None:
    assert len(KEYS) + len(FILES) >= 60
