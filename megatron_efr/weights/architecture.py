"""Reads what config.json says a model is: the facts that building, mapping and decoding need;
refuses others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_efr.config import ConfigError
from megatron_efr.config.json_object import read_object
from megatron_efr.weights.fields import Fields
from megatron_efr.weights.rotary import Rotary, read_rotary


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of experts that stands in every layer."""

    count: int
    per_token: int
    ffn: int
    normalized: bool  # the chosen experts' probabilities are scaled to sum to 1


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder-only transformer with RMSNorm, SwiGLU and rotary embeddings, by its Hugging Face
    numbers.
    """

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int  # the true vocabulary: config.json's vocab_size, not the tokenizer's length
    max_positions: int  # YaRN's reach included
    rotary: Rotary
    norm_eps: float
    tied: bool
    qkv_bias: bool
    initializer_range: float
    qk_norm: bool = False  # RMSNorm over each head of queries and keys
    experts: Experts | None = None  # in place of the dense MLP, in every layer
    # config.json as it was read, for those who need more of it: it is read once
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, model: str | Path | Mapping[str, Any] | Architecture) -> Architecture:
        """The architecture of a model folder, or of a config.json's dictionary, or the one
        given.
        """
        if isinstance(model, Architecture):
            return model
        return (
            cls.from_config(dict(model)) if isinstance(model, Mapping) else cls.from_folder(model)
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> Architecture:
        """Read `folder`/config.json; ConfigError if it is missing or is not a model this project
        builds.
        """
        path = Path(folder) / "config.json"
        if not Path(folder).is_dir():
            raise ConfigError(
                f"model.path: {folder}: no such folder; a Hugging Face model folder is expected"
            )
        if not path.is_file():
            raise ConfigError(
                f"model.path: {path}: not found; a Hugging Face model folder holds a config.json"
            )
        return cls.from_config(read_object(path), str(path))

    @classmethod
    def from_config(cls, raw: dict[str, Any], source: str = "config.json") -> Architecture:
        """Read the dictionary of a config.json, refusing by name what would be silently computed
        wrong.
        """
        model_type = str(raw.get("model_type"))
        _refuse_unknown(raw, model_type, source)
        fields = Fields(raw, f"{source}: ")
        # fields whose default depends on the model's type
        heads, hidden = fields.count("num_attention_heads"), fields.count("hidden_size")
        silent = heads if "num_key_value_heads" in fields else _KV_HEADS.get(model_type, heads)
        rotary = read_rotary(raw, f"{source}: ")
        made = cls(
            model_type=model_type,
            layers=fields.count("num_hidden_layers", most=_MOST),
            hidden=hidden,
            heads=heads,
            kv_heads=fields.count("num_key_value_heads", silent),
            # Qwen 3's is 128 in transformers if config.json is silent, whatever the hidden size
            head_dim=fields.count(
                "head_dim", 128 if model_type == "qwen3" else max(hidden // heads, 1)
            ),
            ffn=fields.count("intermediate_size"),
            vocab=fields.count("vocab_size"),
            max_positions=rotary.reach(fields.count("max_position_embeddings")),
            rotary=rotary,
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            tied=fields.flag("tie_word_embeddings", False),
            # which always has it, and its config.json does not say so
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type in ("qwen3", "qwen3_moe"),
            initializer_range=fields.number("initializer_range", 0.02),
            experts=_experts(fields) if model_type == "qwen3_moe" else None,
            raw=raw,
        )
        made._check(fields)
        return made

    def _check(self, fields: Fields) -> None:
        # transformers' Llama wants it even if head_dim is given
        if self.hidden % self.heads and ("head_dim" not in fields or self.model_type == "llama"):
            raise fields.refusal(
                "hidden_size", f"{self.hidden} does not divide by num_attention_heads {self.heads}"
            )
        if self.heads % self.kv_heads:
            silent = (
                ""
                if "num_key_value_heads" in fields
                else f" (what an absent one means for {self.model_type})"
            )
            raise fields.refusal(
                "num_key_value_heads",
                f"{self.kv_heads}{silent} does not divide num_attention_heads {self.heads}",
            )
        if self.head_dim % 2:
            raise fields.refusal("head_dim", f"{self.head_dim}: rotary embeddings need an even one")


# Fields that this module reads.
_READ = {
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim",
    "intermediate_size", "vocab_size", "max_position_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters",
    "rms_norm_eps", "tie_word_embeddings", "initializer_range", "layer_types",
}  # fmt: skip
# Fields that change nothing in the computation of log-probs.
_NEUTRAL = {
    "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype",
    "transformers_version",
    "use_cache", "_name_or_path", "return_dict", "max_window_layers", "router_aux_loss_coef",
    "output_router_logits",
    # in every configuration that transformers turns into a dict
    "chunk_size_feed_forward", "id2label", "label2id",
    "unk_token_id", "_attn_implementation_autoset", "is_llama_config", "transformers.js_config",
    "unsloth_version",
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
    "is_causal": True,
    "rope_is_neox_style": True,  # SGLang's word for rotating halves
    "rope_interleaved": False,
}
# What each supported type adds to the above: fields that are read, or fixed.
_TYPES: dict[str, tuple[set[str], dict[str, Any]]] = {
    # the window counts only with use_sliding_window
    "qwen2": ({"sliding_window"}, {"attention_bias": True}),
    "qwen3": ({"sliding_window"}, {}),
    "qwen3_moe": (
        {"sliding_window", "moe_intermediate_size", "num_experts", "num_local_experts",
            "num_experts_per_tok",
         "norm_topk_prob"},
        {"mlp_only_layers": [], "decoder_sparse_step": 1},
    ),
    "llama": (set(), {}),
    "mistral": (set(), {"sliding_window": None}),
}  # fmt: skip
_MOST = 10_000  # layers, or experts of one: each is gone through by name
# Key-value heads in transformers if config.json is silent; Llama then has as many as heads.
_KV_HEADS = {"qwen2": 32, "qwen3": 32, "qwen3_moe": 4, "mistral": 8}


def _refuse_unknown(raw: dict[str, Any], model_type: str, source: str) -> None:
    """ConfigError for the first field whose meaning, or whose value, is not what will be built."""
    # each family has fields of its own, and defaults of its own for the same fields
    if model_type not in _TYPES:
        raise ConfigError(
            f"{source}: model_type {raw.get('model_type')!r} is not supported; supported: "
            f"{', '.join(_TYPES)}"
        )
    # fields that must have one value; fields that nobody reads
    read, fixed = _TYPES[model_type]
    fixed = _FIXED | fixed
    for name, value in raw.items():
        if name in fixed:
            if value is not None and not _same(value, fixed[name]):
                window = (
                    ": sliding-window attention is not built" if "sliding_window" in name else ""
                )
                raise ConfigError(
                    f"{source}: {name} {value!r} is not supported; supported: "
                    f"{json.dumps(fixed[name])}{window}"
                )
        # silent or null fields change nothing
        elif name not in _READ | _NEUTRAL | read and value is not None and value is not False:
            why = (
                "quantised weights are not read: take the folder that they were made from"
                if name == "quantization_config"
                else (
                    f"{repr(value)[:80]} is not known for a {model_type} model; if it does not "
                    "change what the model computes, take it out"
                )
            )
            raise ConfigError(f"{source}: {name}: {why}")
    # sliding windows, by the fields of several families
    if model_type == "mistral" and "sliding_window" not in raw:
        raise ConfigError(
            f"{source}: sliding_window is missing, which means 4096: null is required, no "
            "sliding-window"
        )
    if not isinstance(raw.get("layer_types") or [], list):
        raise ConfigError(
            f"{source}: layer_types: a list is required, found {raw['layer_types']!r}"
        )
    if any(layer != "full_attention" for layer in raw.get("layer_types") or []):
        raise ConfigError(
            f"{source}: layer_types: sliding-window attention is not supported; full_attention is"
        )


def _same(value: Any, wanted: Any) -> bool:
    """True if JSON's `value` is `wanted`; Python takes true for 1."""
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def _experts(fields: Fields) -> Experts:
    # transformers 5 writes the number of experts under another name than the published models have
    # it
    key = "num_experts" if fields.values.get("num_experts") is not None else "num_local_experts"
    made = Experts(
        count=fields.count(key, most=_MOST),
        per_token=fields.count("num_experts_per_tok"),
        ffn=fields.count("moe_intermediate_size"),
        normalized=fields.flag("norm_topk_prob", False),
    )
    if made.per_token > made.count:
        raise fields.refusal(
            "num_experts_per_tok", f"{made.per_token} is more than {key} {made.count}"
        )
    if made.per_token == 1 and made.normalized:
        raise fields.refusal(
            "num_experts_per_tok", "1 with norm_topk_prob: the router would learn nothing"
        )
    return made
