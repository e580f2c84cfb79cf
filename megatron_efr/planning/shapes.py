"""The shape of the model that a configuration names: its folder's, a config.json's, or a published
one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_efr.config import ConfigError
from megatron_efr.config.json_object import read_object

_QWEN2 = {
    "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip

PUBLISHED: dict[str, dict[str, Any]] = {
    "DeepSeek-R1-Distill-Qwen-1.5B": _QWEN2
    | {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    }
    | {"intermediate_size": 8960, "vocab_size": 151936},
    "DeepSeek-R1-Distill-Qwen-7B": _QWEN2
    | {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    | {"intermediate_size": 18944, "vocab_size": 152064},
    "DeepSeek-R1-Distill-Qwen-32B": _QWEN2
    | {
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
    }
    | {"intermediate_size": 27648, "vocab_size": 152064, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "Qwen2.5-0.5B-Instruct": _QWEN2
    | {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    }
    | {
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    }
    | {"max_position_embeddings": 32768},
    "SmolLM2-135M-Instruct": _QWEN2
    | {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "rope_theta": 100000.0,
    }
    | {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "max_position_embeddings": 8192},
}
"""config.json of models on the Hugging Face hub, as far as it makes their shape, by the last part
of their name.
"""


def shape_of(path: str) -> dict[str, Any]:
    """config.json of `model.path`: of the folder, or the file itself; if neither is there, of the
    model published under the path's last part. ConfigError if there is none of that name.
    """
    place = Path(path)
    if place.is_file():
        return read_object(place)
    if (place / "config.json").is_file():
        return read_object(place / "config.json")
    if place.name in PUBLISHED:
        return PUBLISHED[place.name]
    raise ConfigError(
        f"model.path: {path}: no model folder and no config.json there, and no published shape of "
        f"the name {place.name} is known; fetch the model's config.json alone and give it: "
        f"model.path=FILE. Known: {', '.join(PUBLISHED)}"
    )
