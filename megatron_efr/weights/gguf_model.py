"""The model in a GGUF file: its config.json, and its weights under Hugging Face's names and in
their order of rows.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from megatron_efr.errors import UserError
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.fields import Fields
from megatron_efr.weights.folder import TensorSource
from megatron_efr.weights.frequencies import inverse_frequencies
from megatron_efr.weights.gguf_file import GGUFFile
from megatron_efr.weights.located import some
from megatron_efr.weights.rotary import DEFAULT_THETA, Rotary

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
EMBEDDING, HEAD, FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_IN_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_REQUIRED = ("block_count", "context_length", "embedding_length", "feed_forward_length",
    "attention.head_count",
             "attention.layer_norm_rms_epsilon")  # fmt: skip
_READ = {
    *_REQUIRED, "attention.head_count_kv", "attention.key_length", "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length",
}  # fmt: skip
_NEUTRAL = {"vocab_size", "rope.scaling.finetuned", "tensor_data_layout"}
_SCALINGS = {"linear": ("factor",), "yarn": ("factor", "original_max_position_embeddings")}
# Llama 3's, 3.1's, 3.2's and 3.3's: the file holds the frequencies' divisors alone, whose greatest
# is the factor.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read_config(file: GGUFFile) -> dict[str, Any]:
    """The config.json of the model in `file`, without the tokens' ids and the weights' type.

    UserError for another architecture, for a key that is missing, and for one whose meaning is not
    known: the model would be computed wrong.
    """
    kind = file.metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{file.path}: general.architecture {kind!r} is not supported; supported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    # the metadata of this architecture
    own = {
        key.removeprefix(f"{kind}."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{kind}.")
    }
    if missing := [f"{kind}.{key}" for key in _REQUIRED if key not in own]:
        raise UserError(f"{file.path}: the metadata lacks {', '.join(missing)}")
    fields = Fields(own, f"{file.path}: {kind}.")
    if EMBEDDING not in file.tensors:
        raise UserError(
            f"{file.path}: there is no tensor {EMBEDDING}; a vocabulary alone is no model"
        )
    # sizes, checked as config.json's are
    heads, hidden = fields.count("attention.head_count"), fields.count("embedding_length")
    head_dim = fields.count("attention.key_length", max(hidden // heads, 1))
    _refuse_unknown(fields, head_dim)
    # the fields of config.json
    config = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": fields.count("feed_forward_length"),
        "num_hidden_layers": fields.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": fields.count("context_length"),
        "vocab_size": file.tensors[EMBEDDING].shape[0],
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number("rope.freq_base", DEFAULT_THETA),
        "tie_word_embeddings": HEAD not in file.tensors,
    }
    # long contexts, and what differs in Qwen 2
    if scaling := _scaling(file, fields, config):
        config["rope_scaling"] = scaling
    if kind == "qwen2":
        if head_dim * heads != hidden:
            raise fields.refusal(
                "attention.key_length", f"{head_dim}: Qwen 2 has {hidden // heads}"
            )
        del config["head_dim"]  # no field of Qwen 2's
    return config


def _refuse_unknown(fields: Fields, head_dim: int) -> None:
    fixed = {
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "attention.causal": True,
        "expert_count": 0,
        "expert_used_count": 0,
        "attention.sliding_window": 0,
    }
    for key, value in fields.values.items():
        if key in fixed:
            if value != fixed[key]:
                raise fields.refusal(key, f"{value!r} is not supported; supported: {fixed[key]!r}")
        elif key not in _READ | _NEUTRAL:
            raise fields.refusal(
                key, f"{repr(value)[:80]} is not known, and may change what the model computes"
            )


def _scaling(file: GGUFFile, fields: Fields, config: dict[str, Any]) -> dict[str, Any] | None:
    kind = fields.values.get("rope.scaling.type", "none")
    if FACTORS in file.tensors:
        if kind != "none":
            raise fields.refusal("rope.scaling.type", f"{kind!r} beside {FACTORS} is not supported")
        return _llama3(file, config)
    if kind == "none":
        return None
    if kind not in _SCALINGS:
        raise fields.refusal(
            "rope.scaling.type", f"{kind!r} is not supported; supported: {', '.join(_SCALINGS)}"
        )
    values = {
        "factor": fields.number("rope.scaling.factor"),
        "original_max_position_embeddings": fields.count(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        ),
    }
    return {"rope_type": kind} | {key: values[key] for key in _SCALINGS[kind]}


def _llama3(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """The rope_scaling whose divisors of the frequencies the file holds; UserError if Llama 3's are
    not these.
    """
    found = file.tensor(FACTORS, torch.float32).flatten()
    factor = round(float(found.max()), 4)
    theta, head_dim = config["rope_theta"], config["head_dim"]
    rotary = Rotary(
        theta, "llama3", factor, _LLAMA3["original_max_position_embeddings"],
        _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"],
    )  # fmt: skip
    wanted = inverse_frequencies(Rotary(theta), head_dim) / inverse_frequencies(rotary, head_dim)
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-4):
        raise UserError(
            f"{file.path}: {FACTORS} holds other numbers than Llama 3's rope scaling by "
            f"{factor:g} with {_LLAMA3} has"
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


class GGUFWeights(TensorSource):
    """The tensors of a GGUF file, one in memory at a time, as `dtype`: dequantised in float32, then
    rounded.

    Every tensor that `config` makes must be there with its shape, and no other, before any is read
    (UserError).
    """

    def __init__(self, file: GGUFFile, config: dict[str, Any], dtype: torch.dtype) -> None:
        self.architecture = Architecture.from_config(config, f"{file.path}: as config.json")
        super().__init__(self.architecture)
        self._file, self._dtype = file, dtype
        self._check()

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._file.tensor(stored_name(name), self._dtype)
        a = self.architecture
        if a.model_type == "llama" and (heads := _turned_heads(name, a)):
            # llama.cpp turns neighbouring rows, as Meta's own files do; transformers turns row i
            # and i + head_dim / 2
            tensor = (
                tensor.view(heads, -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            )
        return tensor

    def _check(self) -> None:
        names = {stored_name(name): name for name in self.shapes}
        missing = sorted(names.keys() - self._file.tensors.keys())
        extra = sorted(self._file.tensors.keys() - names.keys() - {FACTORS})
        if missing or extra:
            raise UserError(
                f"{self._file.path}: the tensors are not those of a "
                f"{self.architecture.model_type} model of its metadata; missing {some(missing)}, "
                f"unexpected {some(extra)}"
            )
        for stored, name in names.items():
            found = self._file.tensors[stored].shape
            wanted = self.shapes[name]
            if found != wanted:
                raise UserError(
                    f"{self._file.path}: {stored} is {list(found)}, the metadata make it "
                    f"{list(wanted)}"
                )


def stored_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    stem, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem):
        return f"blk.{match[1]}.{_IN_LAYER[match[2]]}.{kind}"
    return f"{_NAMES[stem]}.{kind}"


def _turned_heads(name: str, architecture: Architecture) -> int | None:
    """Number of query or key heads that the tensor holds; None if it holds neither."""
    heads = {"q_proj.weight": architecture.heads, "k_proj.weight": architecture.kv_heads}
    return heads.get(".".join(name.split(".")[-2:]))
