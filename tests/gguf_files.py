"""GGUF files of tiny models, written with the package `gguf` as llama.cpp's converter writes
them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from tokenizers import pre_tokenizers

gguf: Any = pytest.importorskip(
    "gguf", reason="the package gguf is not installed: pip install 'megatron-efr[gguf]'"
)

CONTROL = {
    "smollm": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "deepseek-r1-qwen": ["<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜User｜>"],
    "llama-bpe": ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
}
ENDS = {
    "smollm": "<|im_end|>",
    "qwen2": "<|im_end|>",
    "deepseek-r1-qwen": "<｜end▁of▁sentence｜>",
    "llama-bpe": "<|eot_id|>",
}
BEGINS = {
    "smollm": "<|im_start|>", "qwen2": "<|endoftext|>", "deepseek-r1-qwen": "<｜begin▁of▁sentence｜>",
    "llama-bpe": "<|begin_of_text|>",
}  # fmt: skip
MERGES = ["Ġ Ġ", "5 5", "Ġ a", "a p", "Ã ©", "i n", "Ġ in"]
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt "
    "%}:{% endif %}"
)
ROWS = 288  # of the embedding: more than there are tokens
PRE = {"llama": "smollm", "qwen2": "qwen2", "qwen3": "qwen2"}


def vocabulary(pre: str) -> tuple[list[str], list[int]]:
    """Tokens in order and their types: bytes, merges, a word without merges, control tokens,
    `<think>`, unused.
    """
    normal = [
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(merge.replace(" ", "") for merge in MERGES),
        "xyz",
    ]
    tokens = [*normal, *CONTROL[pre], "<think>"]
    types = [1] * len(normal) + [3] * len(CONTROL[pre]) + [4]
    unused = range(len(tokens), ROWS)
    return [*tokens, *(f"[PAD{index}]" for index in unused)], types + [5] * len(unused)


def add_tokenizer(writer: Any, kind: str, **changes: Any) -> None:
    tokens, types = vocabulary(kind)
    values = {
        "model": "gpt2", "pre": kind, "tokens": tokens, "token_type": types, "merges": MERGES,
        "bos_token_id": tokens.index(BEGINS[kind]), "eos_token_id": tokens.index(ENDS[kind]),
        "padding_token_id": tokens.index(CONTROL[kind][0]),
    }  # fmt: skip
    for key, value in (values | changes).items():
        add(writer, f"tokenizer.ggml.{key}", value)
    writer.add_chat_template(TEMPLATE)


def add(writer: Any, key: str, value: Any) -> None:
    """One key of the metadata in the type that llama.cpp gives it; None: leave it out."""
    kinds = {
        str: writer.add_string,
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
    }
    if value is not None:
        kinds.get(type(value), writer.add_array)(key, value)


def write_model(
    path: Path,
    folder: Path,
    kinds: Mapping[str, str] | None = None,
    *,
    metadata: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    pre: str | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """The model of `folder`, in float32 but if `kinds` says otherwise by the end of llama.cpp's
    name.

    The other arguments replace or add keys and tensors; None takes one out.
    """
    config = json.loads((folder / "config.json").read_text())
    kind = config["model_type"]
    writer = gguf.GGUFWriter(path, kind)
    for key, value in (model_metadata(config) | dict(metadata or {})).items():
        add(writer, key, value)
    add_tokenizer(writer, pre or PRE[kind], **(tokenizer or {}))
    stored = model_tensors(config, folder) | dict(tensors or {})
    for name, array in stored.items():
        quantised = next((one for end, one in (kinds or {}).items() if name.endswith(end)), "F32")
        if array is not None:
            number = gguf.GGMLQuantizationType[quantised]
            writer.add_tensor(name, gguf.quants.quantize(array, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    rope, kind = config["rope_parameters"], config["model_type"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    found: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(rope["rope_theta"]),
    }  # fmt: skip
    found |= (
        {"attention.key_length": head_dim, "attention.value_length": head_dim}
        if kind == "qwen3"
        else {}
    )
    found |= (
        {"rope.dimension_count": head_dim, "vocab_size": config["vocab_size"]}
        if kind == "llama"
        else {}
    )
    if rope["rope_type"] in ("linear", "yarn"):
        found |= {
            "rope.scaling.type": rope["rope_type"],
            "rope.scaling.factor": float(rope["factor"]),
        }
    if rope["rope_type"] == "yarn":
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return {f"{kind}.{key}": value for key, value in found.items()}


def model_tensors(config: Mapping[str, Any], folder: Path) -> dict[str, np.ndarray]:
    """Arrays under llama.cpp's names; queries and keys of a Llama with the rows of each head
    interleaved.
    """
    names = gguf.get_tensor_name_map(
        {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[config["model_type"]],
        config["num_hidden_layers"],
    )
    found = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem, _, end = name.rpartition(".")
        array = tensor.float().numpy()
        if config["model_type"] == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config[
                "num_attention_heads" if stem.endswith("q_proj") else "num_key_value_heads"
            ]
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if name != "lm_head.weight" or not config["tie_word_embeddings"]:
            found[f"{names.get_name(stem)}.{end}"] = array
    if config["rope_parameters"]["rope_type"] == "llama3":
        found["rope_freqs.weight"] = llama3_divisors(config["rope_parameters"], config["head_dim"])
    return found


def llama3_divisors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """Divisors of frequencies, as llama.cpp's converter writes them beside a Llama 3."""
    divisors, positions = [], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        smooth = min(max((positions / wavelength - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, dtype=np.float32)
