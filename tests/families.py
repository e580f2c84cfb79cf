"""Tiny model folders of every supported family, as `transformers` writes them, with lively random
weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
YARN_ROPE: dict[str, Any] = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}  # fmt: skip
_MOE: dict[str, Any] = {
    "head_dim": 32,
    "moe_intermediate_size": 48,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
FAMILIES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "qwen3-tied": (
        Qwen3Config,
        {"head_dim": 32, "tie_word_embeddings": True, "num_key_value_heads": 1},
    ),
    "llama": (LlamaConfig, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "llama3": (LlamaConfig, {"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 16384}),
    "llama-linear": (
        LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 5e5}},
    ),
    "qwen2-yarn": (Qwen2Config, {"rope_parameters": YARN_ROPE}),
    "qwen3-yarn": (
        Qwen3Config,
        {"rope_parameters": YARN_ROPE | {"attention_factor": 1.3, "truncate": False}},
    ),
    "mistral": (MistralConfig, {"head_dim": 32, "num_key_value_heads": 1, "sliding_window": None}),
    "qwen3-moe": (Qwen3MoeConfig, _MOE | {"norm_topk_prob": True}),
    "qwen3-moe-raw": (Qwen3MoeConfig, _MOE | {"norm_topk_prob": False}),
}


def make_family_folder(
    folder: Path, family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """2 layers, 61 tokens, hidden 64, 4 heads, 2 KV heads, unless the family or `changes` say
    otherwise.
    """
    kind, fields = FAMILIES[family]
    sizes = {
        "vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96, "max_position_embeddings": 512, "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(kind(**sizes | fields | changes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
        elif name.endswith("gate.weight"):
            torch.nn.init.normal_(parameter, std=0.5)  # so that experts are chosen with conviction
    model.to(dtype).save_pretrained(folder)
    return folder
