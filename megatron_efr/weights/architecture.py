"""What config.json says a model is: the facts that building, mapping and decoding need, or a refusal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_efr.config import ConfigError


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder-only transformer with RMSNorm, SwiGLU and rotary embeddings, by its Hugging Face numbers."""

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int  # the true vocabulary: config.json's vocab_size, not the tokenizer's length
    max_positions: int
    rope_theta: float
    norm_eps: float
    tied: bool
    qkv_bias: bool
    initializer_range: float

    @classmethod
    def from_folder(cls, folder: str | Path) -> Architecture:
        """Read `folder`/config.json; ConfigError where it is missing or is not a model this project builds."""
        path = Path(folder) / "config.json"
        if not Path(folder).is_dir():
            raise ConfigError(f"model.path: {folder}: no such folder; a Hugging Face model folder is expected")
        if not path.is_file():
            raise ConfigError(f"model.path: {path}: not found; a Hugging Face model folder holds a config.json")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: not valid JSON: {error}") from error
        return cls.from_config(raw, str(path))

    @classmethod
    def from_config(cls, raw: dict[str, Any], source: str = "config.json") -> Architecture:
        """Read the dictionary of a config.json, refusing by name what would be silently computed wrong."""
        _refuse_unknown(raw, source)
        heads = _required(raw, "num_attention_heads", source)
        hidden = _required(raw, "hidden_size", source)
        return cls(
            model_type=raw["model_type"],
            layers=_required(raw, "num_hidden_layers", source),
            hidden=hidden,
            heads=heads,
            kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or hidden // heads,
            ffn=_required(raw, "intermediate_size", source),
            vocab=_required(raw, "vocab_size", source),
            max_positions=_required(raw, "max_position_embeddings", source),
            rope_theta=float(_rope(raw).get("rope_theta") or raw.get("rope_theta") or 10000.0),
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            tied=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=True,  # Qwen2 always has it, and its config.json does not say so
            initializer_range=float(raw.get("initializer_range", 0.02)),
        )


def _required(raw: dict[str, Any], key: str, source: str) -> int:
    if not isinstance(raw.get(key), int):
        raise ConfigError(f"{source}: {key}: an integer is required, found {raw.get(key)!r}")
    return raw[key]


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings: `rope_parameters` since transformers 5, `rope_scaling` before."""
    return raw.get("rope_parameters") or raw.get("rope_scaling") or {}


def _refuse_unknown(raw: dict[str, Any], source: str) -> None:
    if raw.get("model_type") != "qwen2":
        raise ConfigError(f"{source}: model_type {raw.get('model_type')!r} is not supported; supported: qwen2")
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{source}: hidden_act {raw['hidden_act']!r} is not supported; supported: silu")
    sliding = "sliding_attention" in (raw.get("layer_types") or [])
    if raw.get("use_sliding_window") or sliding:
        raise ConfigError(f"{source}: use_sliding_window: sliding-window attention is not supported")
    rope_type = _rope(raw).get("rope_type", _rope(raw).get("type", "default"))
    if rope_type != "default":
        raise ConfigError(f"{source}: rope_type {rope_type!r} is not supported; supported: default")
