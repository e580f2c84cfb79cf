"""What config.json says a model is: the facts that building, mapping and decoding need, or a refusal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_efr.config import ConfigError


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of experts that stands in every layer."""

    count: int
    per_token: int
    ffn: int
    normalized: bool  # the chosen experts' probabilities are scaled to sum to 1


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
    qk_norm: bool = False  # RMSNorm over each head of queries and keys
    rope_factor: float | None = None  # Llama 3's scaling of the low frequencies
    experts: Experts | None = None  # in place of the dense MLP, in every layer

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
        model_type = str(raw.get("model_type"))
        _refuse_unknown(raw, model_type, source)
        heads, hidden = _count(raw, "num_attention_heads", source), _count(raw, "hidden_size", source)
        theta, factor = _rotary(raw, source)
        made = cls(
            model_type=model_type,
            layers=_count(raw, "num_hidden_layers", source),
            hidden=hidden,
            heads=heads,
            kv_heads=_count(raw, "num_key_value_heads", source, heads),
            # Qwen 3's is 128 in transformers where config.json is silent, whatever the hidden size
            head_dim=_count(raw, "head_dim", source, 128 if model_type == "qwen3" else hidden // heads),
            ffn=_count(raw, "intermediate_size", source),
            vocab=_count(raw, "vocab_size", source),
            max_positions=_count(raw, "max_position_embeddings", source),
            rope_theta=theta,
            rope_factor=factor,
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            tied=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=model_type == "qwen2",  # which always has it, and its config.json does not say so
            qk_norm=model_type in ("qwen3", "qwen3_moe"),
            initializer_range=float(raw.get("initializer_range", 0.02)),
            experts=_experts(raw, source) if model_type == "qwen3_moe" else None,
        )
        made._check(raw, source)
        return made

    def _check(self, raw: dict[str, Any], source: str) -> None:
        if "head_dim" not in raw and self.model_type != "qwen3" and self.hidden % self.heads:
            raise ConfigError(
                f"{source}: hidden_size {self.hidden} does not divide by num_attention_heads {self.heads}"
            )
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"{source}: num_key_value_heads {self.kv_heads} does not divide num_attention_heads {self.heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"{source}: head_dim {self.head_dim}: rotary embeddings need an even one")


# Fields that this module reads.
_READ = {
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters",
    "rms_norm_eps", "tie_word_embeddings", "initializer_range", "layer_types",
}  # fmt: skip
# Fields that change nothing in the computation of log-probs.
_NEUTRAL = {
    "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "transformers_version",
    "use_cache", "_name_or_path", "return_dict", "max_window_layers", "router_aux_loss_coef", "output_router_logits",
    "chunk_size_feed_forward", "id2label", "label2id",  # in every configuration that transformers turns into a dict
}  # fmt: skip
# Fields with one value under which the model is the one that is built here.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "use_sliding_window": False,
    "partial_rotary_factor": 1,
    "pretraining_tp": 1,
}
# What each supported type adds to the above: fields that are read, or fixed.
_TYPES: dict[str, tuple[set[str], dict[str, Any]]] = {
    "qwen2": ({"sliding_window"}, {"attention_bias": True}),  # the window counts only with use_sliding_window
    "qwen3": ({"sliding_window"}, {}),
    "qwen3_moe": (
        {"sliding_window", "moe_intermediate_size", "num_experts", "num_local_experts", "num_experts_per_tok",
         "norm_topk_prob"},
        {"mlp_only_layers": [], "decoder_sparse_step": 1},
    ),
    "llama": (set(), {}),
    "mistral": (set(), {"sliding_window": None}),
}  # fmt: skip
# Llama 3's scaling as Megatron-Core 0.16.1 has it built in (RotaryEmbedding._apply_scaling): only the factor is free.
_LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


def _refuse_unknown(raw: dict[str, Any], model_type: str, source: str) -> None:
    """ConfigError for the first field whose meaning, or whose value, is not what will be built."""
    if model_type not in _TYPES:
        raise ConfigError(
            f"{source}: model_type {raw.get('model_type')!r} is not supported; supported: {', '.join(_TYPES)}"
        )
    read, fixed = _TYPES[model_type]
    fixed = _FIXED | fixed
    for field, value in raw.items():
        if field in fixed:
            if value != fixed[field] and value is not None:
                window = ": sliding-window attention is not built" if "sliding_window" in field else ""
                raise ConfigError(
                    f"{source}: {field} {value!r} is not supported; supported: {json.dumps(fixed[field])}{window}"
                )
        elif field not in _READ | _NEUTRAL | read and value is not None and value is not False:
            raise ConfigError(
                f"{source}: {field} {value!r} is not known for a {model_type} model; if it does not change what the "
                f"model computes, take it out"
            )
    if model_type == "mistral" and "sliding_window" not in raw:
        raise ConfigError(f"{source}: sliding_window is missing, which means 4096: null is required, no sliding-window")
    if set(raw.get("layer_types") or []) - {"full_attention"}:
        raise ConfigError(f"{source}: layer_types: sliding-window attention is not supported; full_attention is")


def _count(raw: dict[str, Any], key: str, source: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{source}: {key}: an integer is required, found {value!r}; it counts from 1")
    return value


def _rotary(raw: dict[str, Any], source: str) -> tuple[float, float | None]:
    """(theta, Llama 3's factor if there is one): `rope_parameters` since transformers 5, `rope_scaling` before."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0)
    if theta != int(theta):
        raise ConfigError(f"{source}: rope_theta {theta}: Megatron takes a whole number")
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)  # the older name, which some configurations carry beside the new one
    if rope.pop("partial_rotary_factor", 1) != 1:
        raise ConfigError(f"{source}: partial_rotary_factor is not supported; supported: 1")
    if kind not in ("default", "llama3"):
        raise ConfigError(f"{source}: rope_type {kind!r} is not supported; supported: default, llama3")
    factor = None
    if kind == "llama3":
        factor = float(rope.pop("factor", 0))
        if factor < 1:
            raise ConfigError(f"{source}: rope_scaling.factor: a number of at least 1 is required")
        for key, value in _LLAMA3.items():
            if (found := rope.pop(key, None)) != value:
                raise ConfigError(f"{source}: rope_scaling.{key} {found!r} is not supported; supported: {value}")
    if rope:
        raise ConfigError(f"{source}: rope_scaling.{min(rope)} is not known for rope_type {kind!r}")
    return theta, factor


def _experts(raw: dict[str, Any], source: str) -> Experts:
    # transformers 5 writes the number of experts under another name than the published models have it
    key = "num_experts" if raw.get("num_experts") is not None else "num_local_experts"
    made = Experts(
        count=_count(raw, key, source),
        per_token=_count(raw, "num_experts_per_tok", source),
        ffn=_count(raw, "moe_intermediate_size", source),
        normalized=bool(raw.get("norm_topk_prob", False)),
    )
    if made.per_token > made.count:
        raise ConfigError(f"{source}: num_experts_per_tok {made.per_token} is more than {key} {made.count}")
    if made.per_token == 1 and made.normalized:
        raise ConfigError(f"{source}: num_experts_per_tok 1 with norm_topk_prob: the router would learn nothing")
    return made
