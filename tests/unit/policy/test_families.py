"""Every supported family: the mapping is exact, the policy's log-probs are transformers', the
unknown is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_efr.config import ConfigError
from megatron_efr.policy import Ranks
from megatron_efr.weights.architecture import Architecture, Experts
from megatron_efr.weights.folder import FolderWeights
from megatron_efr.weights.mapping import WeightMapping
from tests.conftest import ragged_sequences
from tests.families import FAMILIES, LLAMA3_ROPE, make_family_folder
from tests.policies import make_policy

DENSE = [family for family in FAMILIES if "moe" not in family]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_shards_put_together_are_the_folder(
    family: str, dtype: torch.dtype, ranks: int, tmp_path: Path
) -> None:
    path = make_family_folder(tmp_path / "model", family, dtype=dtype)
    architecture = Architecture.from_folder(path)
    for grouped in (False, True) if architecture.experts else (False,):
        mapping = WeightMapping(architecture, ranks, grouped=grouped)
        source = FolderWeights(path, architecture)
        seen = {}
        for name in mapping.parameters():
            whole = {hf: source[hf] for hf in mapping.sources(name)}
            shards = [mapping.to_megatron(name, whole, rank) for rank in range(ranks)]
            assert len({shard.shape for shard in shards}) == 1, name
            seen |= dict(mapping.to_hugging_face(name, shards))
        on_disk = load_file(path / "model.safetensors")
        assert (
            seen.keys()
            == mapping.shapes().keys()
            == on_disk.keys() - ({"lm_head.weight"} if architecture.tied else set())
        )
        assert all(
            seen[name].dtype == dtype and torch.equal(seen[name], on_disk[name]) for name in seen
        )


@pytest.mark.parametrize("family", DENSE)
def test_logprobs_equal_transformers(family: str, ranks: Ranks, tmp_path: Path) -> None:
    path = make_family_folder(tmp_path / "model", family)
    assert _worst_difference(path, ranks, longest=300) <= 1e-5


@pytest.mark.parametrize("family", ["qwen3-moe", "qwen3-moe-raw"])
def test_mixtures_equal_transformers(family: str, ranks: Ranks, tmp_path: Path) -> None:
    path = make_family_folder(tmp_path / "model", family)
    assert _worst_difference(path, ranks, longest=90) <= 1e-5


def _worst_difference(path: Path, ranks: Ranks, longest: int) -> float:
    """The largest difference of a response's log-probs between the policy and transformers."""
    sequences = ragged_sequences(16, longest=longest)
    policy = make_policy(path, ranks)
    batches = policy.pack_update(sequences, list(range(16)), 600, "sequence")
    got = {
        i: part
        for batch, logprobs in zip(batches, policy.logprobs(batches), strict=True)
        for i, part in zip(batch.indices, logprobs.split(batch.row_lengths), strict=True)
    }
    model = AutoModelForCausalLM.from_pretrained(path)
    worst = 0.0
    for i, sequence in enumerate(sequences):
        with torch.no_grad():
            logits = model(torch.tensor([sequence.tokens])).logits[
                0, sequence.prompt_length - 1 : -1
            ]
        targets = torch.tensor(sequence.tokens[sequence.prompt_length :])
        wanted = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
        worst = max(worst, float((got[i] - wanted).abs().max()))
    return worst


@pytest.mark.parametrize("family", ["llama3", "llama-linear", "qwen2-yarn", "qwen3-yarn"])
def test_scaling_matters_at_these_lengths(family: str, tmp_path: Path) -> None:
    """The parity above shows it: without the scaling these log-probs differ visibly."""
    path = make_family_folder(tmp_path / "model", family)
    raw = json.loads((path / "config.json").read_text())
    model, sequence = AutoModelForCausalLM.from_pretrained(path), torch.arange(300)[None] % 61
    raw["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": raw["rope_parameters"]["rope_theta"],
    }
    (path / "config.json").write_text(json.dumps(raw))
    unscaled = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        assert float((model(sequence).logits - unscaled(sequence).logits).abs().max()) > 1e-3


def test_expert_names_of_every_module_mean_the_same(tmp_path: Path) -> None:
    architecture = Architecture.from_folder(make_family_folder(tmp_path / "model", "qwen3-moe"))
    assert architecture.experts == Experts(count=4, per_token=2, ffn=48, normalized=True)
    mapping = WeightMapping(architecture, expert_ranks=2, expert_rank=1)
    mlp = "decoder.layers.1.mlp."
    third = mlp + "experts.local_experts.3.linear_fc1.weight"
    assert mapping.canonical(mlp + "experts.local_experts.1.linear_fc1.weight") == third
    assert mapping.canonical(mlp + "experts.linear_fc1.weight1") == third
    assert mapping.sources(third) == (
        "model.layers.1.mlp.experts.3.gate_proj.weight",
        "model.layers.1.mlp.experts.3.up_proj.weight",
    )  # fmt: skip
    assert mapping.sources(mapping.canonical(mlp + "router.weight")) == (
        "model.layers.1.mlp.gate.weight",
    )
    assert [
        mapping.expert_rank(name)
        for name in (third, mlp + "experts.local_experts.1.linear_fc2.weight")
    ] == [1, 0]
    assert mapping.expert_rank(mlp + "router.weight") is None
    with pytest.raises(KeyError, match="no such parameter"):
        mapping.canonical(mlp + "experts.local_experts.2.linear_fc1.weight")
    grouped = WeightMapping(architecture, expert_ranks=2, expert_rank=1, grouped=True)
    name = grouped.canonical(mlp + "experts.weight1")
    assert name == mlp + "experts.2-3.weight1"
    assert grouped.expert_rank(name) == 1
    assert len(grouped.sources(name)) == 4
    norms = {
        "decoder.layers.1.self_attention.q_layernorm.weight": "model.layers.1.self_attn.q_norm.weight",
        "decoder.layers.1.self_attention.k_layernorm.weight": "model.layers.1.self_attn.k_norm.weight",
    }
    assert {name: mapping.sources(name)[0] for name in norms} == norms


def test_grouped_experts_multiply_as_their_module_does(tmp_path: Path) -> None:
    """GroupedMLP.forward views weight1 as [experts, hidden, 2 ffn] and weight2 as [experts, ffn,
    hidden].
    """
    path = make_family_folder(tmp_path / "model", "qwen3-moe")
    architecture = Architecture.from_folder(path)
    mapping, source = WeightMapping(architecture, grouped=True), FolderWeights(path, architecture)
    weights = []
    for tensor in ("weight1", "weight2"):
        name = f"decoder.layers.0.mlp.experts.0-3.{tensor}"
        weights.append(
            mapping.to_megatron(name, {hf: source[hf] for hf in mapping.sources(name)}, 0)
        )
    assert [tuple(weight.shape) for weight in weights] == [(64, 4 * 2 * 48), (4 * 48, 64)]
    x = torch.randn(5, 64)
    for e in range(4):
        prefix = f"model.layers.0.mlp.experts.{e}."
        gate, up = (x @ weights[0].view(4, 64, -1)[e]).chunk(2, -1)
        assert torch.allclose(gate, x @ source[prefix + "gate_proj.weight"].T)
        assert torch.allclose(up, x @ source[prefix + "up_proj.weight"].T)
        assert torch.equal(weights[1].view(4, -1, 64)[e], source[prefix + "down_proj.weight"].T)


def config(model_type: str, **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "model_type": model_type, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4, "intermediate_size": 96, "vocab_size": 32,
        "max_position_embeddings": 128,
        "sliding_window": None,
    }  # fmt: skip
    if model_type == "qwen3_moe":
        base |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return base | changes


def test_config_facts_of_published_models() -> None:
    """The fields of the models' config.json as published (transformers 4's names)."""
    old = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
    llama = Architecture.from_config(
        config("llama", rope_scaling=old, rope_theta=500000.0, mlp_bias=False)
    )
    assert (llama.rotary.kind, llama.rotary.factor, llama.rotary.theta) == ("llama3", 8.0, 5e5)
    assert (llama.qkv_bias, llama.qk_norm) == (False, False)
    qwen3 = Architecture.from_config(config("qwen3", num_key_value_heads=2, attention_bias=False))
    assert (qwen3.head_dim, qwen3.kv_heads, qwen3.qkv_bias, qwen3.qk_norm) == (128, 2, False, True)
    distill = {
        "use_mrope": False, "use_sliding_window": False, "sliding_window": 4096,
        "max_window_layers": 21,
        "torch_dtype": "bfloat16", "transformers_version": "4.44.0", "attention_dropout": 0.0,
    }  # fmt: skip
    assert Architecture.from_config(config("qwen2", **distill)).qkv_bias
    moe = Architecture.from_config(
        config("qwen3_moe", norm_topk_prob=True, mlp_only_layers=[], decoder_sparse_step=1)
    )
    assert moe.experts == Experts(count=8, per_token=2, ffn=32, normalized=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_configurations_are_known(family: str) -> None:
    kind, fields = FAMILIES[family]
    assert (
        Architecture.from_config(kind(**fields).to_dict()).layers
        == kind(**fields).num_hidden_layers
    )


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            config("mistral", sliding_window=4096),
            "sliding_window 4096 is not supported; supported: null: sliding-window",
        ),
        (
            {k: v for k, v in config("mistral").items() if k != "sliding_window"},
            "sliding_window is missing",
        ),
        (config("qwen3", layer_types=["sliding_attention", "full_attention"]), "layer_types"),
        (
            config("llama", rope_scaling={"type": "dynamic", "factor": 4.0}),
            "rope_scaling.type: 'dynamic' is not supp",
        ),
        (config("llama", rope_scaling={"rope_type": "llama3"}), "rope_scaling.factor: a number"),
        (
            config("llama", rope_parameters={"rope_theta": 1e4, "mrope_section": [1]}),
            "rope_parameters.mrope_section",
        ),
        (
            config("llama", attention_bias=True),
            "attention_bias True is not supported; supported: false",
        ),
        (config("llama", mlp_bias=True), "mlp_bias True"),
        (config("llama", partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
        (config("llama", hidden_act="gelu"), "hidden_act 'gelu'"),
        (config("llama", pretraining_tp=2), "pretraining_tp 2"),
        (
            config("llama", quantization_config={"bits": 4}),
            "quantization_config: quantised weights are not read",
        ),
        (
            config("qwen2", moe_intermediate_size=4),
            "moe_intermediate_size: 4 is not known for a qwen2 model",
        ),
        (
            config("llama", num_key_value_heads=3),
            "num_key_value_heads: 3 does not divide num_attention_heads 4",
        ),
        (
            config("llama", hidden_size=66),
            "hidden_size: 66 does not divide by num_attention_heads 4",
        ),
        (
            config("llama", hidden_size=66, head_dim=16),
            "hidden_size: 66 does not divide by num_attention_heads 4",
        ),
        (config("llama", head_dim=15), "head_dim: 15: rotary embeddings need an even one"),
        (
            config("llama", num_attention_heads=True),
            "num_attention_heads: an integer is required, found True",
        ),
        (
            config("qwen3_moe", mlp_only_layers=[0]),
            r"mlp_only_layers \[0\] is not supported; supported: \[\]",
        ),
        (config("qwen3_moe", decoder_sparse_step=2), "decoder_sparse_step 2"),
        (
            config("qwen3_moe", num_experts_per_tok=9),
            "num_experts_per_tok: 9 is more than num_experts 8",
        ),
        (
            config("qwen3_moe", num_experts_per_tok=1, norm_topk_prob=True),
            "num_experts_per_tok: 1 with norm_topk_prob",
        ),
        (config("llama", is_causal=False), "is_causal False is not supported; supported: true"),
        (
            config("llama", rope_is_neox_style=False),
            "rope_is_neox_style False is not supported; supported: true",
        ),
        (
            config("llama", pretraining_tp=True),
            "pretraining_tp True is not supported; supported: 1",
        ),
        (config("llama", attention_bias=0), "attention_bias 0 is not supported; supported: false"),
        (
            config("llama", tie_word_embeddings="false"),
            "tie_word_embeddings: true or false is required, found 'false'",
        ),
        (
            config("llama", tie_word_embeddings=None),
            "tie_word_embeddings: true or false is required, found None",
        ),
        (
            config("llama", rms_norm_eps="1e-5"),
            "rms_norm_eps: a number above 0 is required, found '1e-5'",
        ),
        (config("llama", rms_norm_eps=0), "rms_norm_eps: a number above 0 is required, found 0"),
        (
            config("llama", rms_norm_eps=float("inf")),
            "rms_norm_eps: a number above 0 is required, found inf",
        ),
        (
            config("llama", initializer_range=-0.1),
            "initializer_range: a number above 0 is required, found -0.1",
        ),
        (config("llama", rope_theta=0), "rope_theta: a number above 1 is required, found 0"),
        (
            config("llama", hidden_size="64"),
            "hidden_size: an integer is required, found '64'; it counts from 1",
        ),
        (config("llama", vocab_size=32.0), "vocab_size: an integer is required, found 32.0"),
        (
            config("llama", num_hidden_layers=0),
            "num_hidden_layers: an integer is required, found 0",
        ),
        (
            config("llama", num_hidden_layers=10**30),
            r"num_hidden_layers: 10+ is more than any model has \(10,000\)",
        ),
        (
            config("llama", hidden_size=2**40),
            r"hidden_size: 1099511627776 is more than any model has",
        ),
        (
            config("llama", max_position_embeddings=-1),
            "max_position_embeddings: an integer is required, found -1",
        ),
        (
            config("llama", num_attention_heads=128),
            "hidden_size: 64 does not divide by num_attention_heads 128",
        ),
        (
            config("llama", layer_types="full_attention"),
            "layer_types: a list is required, found 'full_attention'",
        ),
        (
            config("qwen3_moe", norm_topk_prob="yes"),
            "norm_topk_prob: true or false is required, found 'yes'",
        ),
        (
            {k: v for k, v in config("qwen3").items() if k != "num_key_value_heads"},
            r"num_key_value_heads: 32 \(what an absent one means for qwen3\) does not divide num_attention_heads 4",
        ),
        (
            config("gemma2"),
            "model_type 'gemma2' is not supported; supported: qwen2, qwen3, qwen3_moe, llama, "
            "mistral",
        ),
    ],
)
def test_what_would_be_computed_wrong_is_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Architecture.from_config(raw)


@pytest.mark.parametrize(
    ("changes", "split", "message"),
    [
        ({}, {"tensor_ranks": 8}, "parallel.tensor: 4 attention heads do not divide over "
            "8 ranks; 1, 2 or 4 would fit"),
        ({"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 6},
            {"tensor_ranks": 4},
         "parallel.tensor: 6 key-value heads neither divide over 4 ranks nor divide 4; 1, 2, 3, 6 "
         "or 12 would"),
        ({"intermediate_size": 97}, {"tensor_ranks": 2}, "parallel.tensor: the feed-forward "
            "width 97 does not"),
        ({}, {"expert_ranks": 3}, None),
    ],
)  # fmt: skip
def test_splits_that_do_not_divide_are_refused(
    changes: dict[str, Any], split: dict[str, int], message: str
) -> None:
    architecture = Architecture.from_config(config("llama", **changes))
    if message is None:
        architecture = Architecture.from_config(config("qwen3_moe"))
        message = "parallel.expert: 8 experts do not divide over 3 ranks; 1, 2, 4 or 8 would fit"
    with pytest.raises(ConfigError, match=message):
        WeightMapping(architecture, **split)
