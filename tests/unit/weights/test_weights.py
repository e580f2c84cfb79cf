"""The Hugging Face <-> Megatron mapping, both ways; model folders: exact, and loud about what is
wrong.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM

from megatron_efr.config import ConfigError, ModelConfig
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import (
    FolderWeights,
    RandomWeights,
    fingerprint,
    initial_weights,
    save_folder,
)
from megatron_efr.weights.mapping import WeightMapping
from megatron_efr.weights.tensor_parallel_split import padded_vocab


def test_qkv_is_laid_out_by_kv_group(tied_model: Path) -> None:
    architecture = Architecture.from_folder(tied_model)  # 4 heads, 2 kv heads, head dim 16
    mapping, source = WeightMapping(architecture), FolderWeights(tied_model, architecture)
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    q, k, v = (source[hf] for hf in mapping.sources(name))
    fused = mapping.to_megatron(name, {hf: source[hf] for hf in mapping.sources(name)}, 0)
    assert torch.equal(fused, torch.cat([q[:32], k[:16], v[:16], q[32:], k[16:], v[16:]]))


def test_gate_and_up_halves_are_split_separately(tied_model: Path) -> None:
    architecture = Architecture.from_folder(tied_model)
    mapping, source = WeightMapping(architecture, 2), FolderWeights(tied_model, architecture)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    gate, up = (source[hf] for hf in mapping.sources(name))
    shard = mapping.to_megatron(name, {hf: source[hf] for hf in mapping.sources(name)}, 1)
    assert torch.equal(shard, torch.cat([gate[48:], up[48:]]))


def test_vocabulary_is_padded_with_zeros_and_cut_again(untied_model: Path) -> None:
    architecture = Architecture.from_folder(untied_model)  # 61 rows
    mapping, source = WeightMapping(architecture, 2), FolderWeights(untied_model, architecture)
    assert mapping.padded_vocab == 64
    assert [padded_vocab(61, ranks) for ranks in (1, 2, 4, 8, 16)] == [64, 64, 64, 64, 128]
    whole = {"lm_head.weight": source["lm_head.weight"]}
    shards = [mapping.to_megatron("output_layer.weight", whole, rank) for rank in range(2)]
    assert torch.all(shards[1][29:] == 0)
    assert torch.equal(
        mapping.to_hugging_face("output_layer.weight", shards)[0][1], whole["lm_head.weight"]
    )


def test_transformer_engine_names_mean_the_same(tied_model: Path) -> None:
    mapping = WeightMapping(Architecture.from_folder(tied_model))
    pairs = {
        "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.3.input_layernorm.weight",
        "decoder.layers.3.mlp.linear_fc1.layer_norm_weight": "decoder.layers.3.pre_mlp_layernorm.weight",
        "output_layer.weight": "embedding.word_embeddings.weight",  # tied
    }
    assert {name: mapping.canonical(name) for name in pairs} == pairs
    with pytest.raises(KeyError, match="no such parameter"):
        mapping.canonical("decoder.layers.4.input_layernorm.weight")


def test_random_weights_follow_seed_and_name_alone(tied_model: Path) -> None:
    architecture = Architecture.from_folder(tied_model)
    one, again, other = (
        RandomWeights(architecture, 1),
        RandomWeights(architecture, 1),
        RandomWeights(architecture, 2),
    )
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(one[name], again[name])
    assert not torch.equal(one[name], other[name])
    assert float(one[name].std()) == pytest.approx(architecture.initializer_range, rel=0.05)
    assert torch.all(one["model.norm.weight"] == 1)
    assert torch.all(one["model.layers.0.self_attn.q_proj.bias"] == 0)


def test_fingerprint_names_the_weights(tied_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tied_model, copy)
    assert fingerprint(copy) == fingerprint(tied_model)
    assert fingerprint(copy, seed=1) != fingerprint(copy, seed=2) != fingerprint(copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(copy) != fingerprint(tied_model)


def test_sharded_folder_with_index_loads_in_transformers(
    untied_model: Path, tmp_path: Path
) -> None:
    architecture = Architecture.from_folder(untied_model)
    source = FolderWeights(untied_model, architecture)
    save_folder(tmp_path / "many", source.items(), untied_model, shard_bytes=40_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(t.nbytes for _, t in source.items())
    again = FolderWeights(tmp_path / "many", architecture)
    assert all(torch.equal(tensor, again[name]) for name, tensor in source.items())
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        logits = [
            Qwen2ForCausalLM.from_pretrained(p)(tokens).logits
            for p in (untied_model, tmp_path / "many")
        ]
    assert torch.equal(logits[0], logits[1])
    assert not (tmp_path / "many.partial").exists()


def config(**changes: Any) -> dict[str, Any]:
    base = {
        "model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "intermediate_size": 96, "vocab_size": 32,
        "max_position_embeddings": 128,
    }  # fmt: skip
    return {key: value for key, value in (base | changes).items() if value is not None}


def test_old_and_new_rope_fields() -> None:
    old = Architecture.from_config(config(rope_theta=1e6))
    new = Architecture.from_config(
        config(rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    )
    assert old.rotary.theta == new.rotary.theta == 1e6
    assert Architecture.from_config(config()).rotary.theta == 1e4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma' is not supported"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4}},
            "rope_scaling.rope_type: 'dynamic'",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_hidden_layers": None}, "num_hidden_layers: an integer is required, found None"),
    ],
)
def test_what_would_be_computed_wrong_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Architecture.from_config(config(**changes))


def test_folders_that_cannot_be_read_are_named(tied_model: Path, tmp_path: Path) -> None:
    architecture = Architecture.from_folder(tied_model)
    with pytest.raises(ConfigError, match=r"model\.path: .*nowhere: no such folder"):
        Architecture.from_folder(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json: not found"):
        Architecture.from_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.init: random"):
        initial_weights(ModelConfig(path=str(tmp_path)), architecture, 0)
    tensors = load_file(tied_model / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.extra"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"missing model\.norm\.weight, unexpected model\.extra"):
        FolderWeights(tmp_path, architecture)
    tensors = load_file(tied_model / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ConfigError, match=r"model\.norm\.weight is \(3,\), config\.json makes it \(64,\)"
    ):
        FolderWeights(tmp_path, architecture)
