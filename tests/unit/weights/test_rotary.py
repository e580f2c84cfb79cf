"""Rotary embeddings are transformers' own, bit for bit, for every combination of the fields of
them, or refused.
"""

from __future__ import annotations

import copy
import itertools
import logging
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from megatron_efr.config import ConfigError
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.frequencies import inverse_frequencies
from megatron_efr.weights.rotary import read_rotary

POSITIONS, HEAD = 4096, 128
MODELS: dict[str, tuple[type[PreTrainedConfig], Any]] = {
    "llama": (LlamaConfig, LlamaRotaryEmbedding),
    "mistral": (MistralConfig, MistralRotaryEmbedding),
    "qwen2": (Qwen2Config, Qwen2RotaryEmbedding),
    "qwen3": (Qwen3Config, Qwen3RotaryEmbedding),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeRotaryEmbedding),
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}
KINDS: dict[str, dict[str, Any] | None] = {
    "absent": None,
    "empty": {},
    "default": {"rope_type": "default"},
    "linear": {"type": "linear", "factor": 2},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", **YARN},
    "old yarn": {"type": "yarn", **YARN},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64,
        "factor": 4.0,
                 "original_max_position_embeddings": 1024},
    "of no kind": {"factor": 2.0},
}  # fmt: skip
# of 10 x 10 x 4: what is refused names a kind that is not computed, or two that differ
COUNTS = (140, 260)
THETAS = ["nowhere", "top", "inside", "both"]


def config_json(model: str, **changes: Any) -> dict[str, Any]:
    """A config.json of one head's width, with what `changes` say; a change to ... leaves the field
    out.
    """
    base: dict[str, Any] = {
        "model_type": model, "hidden_size": 2 * HEAD, "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": HEAD, "intermediate_size": 8, "vocab_size": 8,
        "max_position_embeddings": POSITIONS, "sliding_window": None,
    }  # fmt: skip
    if model == "qwen3_moe":
        base |= {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 4}
    return base | changes


def of_transformers(raw: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Frequencies and attention factor of transformers' own module."""
    kind, rotary = MODELS[raw["model_type"]]
    made = rotary(kind.from_dict(copy.deepcopy(raw)))
    return made.inv_freq, float(made.attention_scaling)


def ours(raw: dict[str, Any]) -> tuple[torch.Tensor, float]:
    architecture = Architecture.from_config(copy.deepcopy(raw))
    return inverse_frequencies(
        architecture.rotary, architecture.head_dim
    ), architecture.rotary.attention_factor


def assert_same(raw: dict[str, Any]) -> None:
    (theirs, factor), (mine, my_factor) = of_transformers(raw), ours(raw)
    assert torch.equal(mine, theirs), raw
    assert my_factor == factor, raw


def with_rope(scaling: str, parameters: str, theta: str) -> dict[str, Any]:
    raw: dict[str, Any] = {} if theta in ("nowhere", "inside") else {"rope_theta": 1e6}
    for field, kind in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        section = KINDS[kind]
        if section is not None:
            raw[field] = dict(section) | (
                {"rope_theta": 5e5} if theta in ("inside", "both") and section else {}
            )
    return raw


@pytest.mark.parametrize("model", MODELS)
def test_every_combination_of_the_fields_is_transformers_or_refused(model: str) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    computed, refusals = 0, []
    for scaling, parameters, theta in itertools.product(KINDS, KINDS, THETAS):
        raw = config_json(model, **with_rope(scaling, parameters, theta))
        try:
            ours(raw)
        except ConfigError as error:
            refusals.append(str(error))
        else:
            assert_same(raw)
            computed += 1
    assert (computed, len(refusals)) == COUNTS
    assert all(
        text.startswith(("config.json: rope_scaling", "config.json: rope_parameters."))
        for text in refusals
    )


@pytest.mark.parametrize("model", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "rope",
    [
        YARN | {"beta_fast": 16, "beta_slow": 2.5},
        YARN | {"truncate": False},
        YARN | {"attention_factor": 1.25},
        YARN | {"mscale": 0.707, "mscale_all_dim": 1.3},
        YARN | {"mscale": 2.0},
        YARN | {"factor": 1.0},
        YARN | {"beta_fast": None, "beta_slow": None, "attention_factor": None, "mscale": None},
        {"factor": 4.0},  # the original positions are then max_position_embeddings
        {"factor": 40, "original_max_position_embeddings": 32, "rope_theta": 100.5},
        {
            "factor": 4.0,
            "original_max_position_embeddings": 131072,
            "beta_fast": 1000.0,
            "beta_slow": 900.0,
        },
    ],
)
def test_yarn_with_every_field(model: str, rope: dict[str, Any]) -> None:
    assert_same(
        config_json(model, rope_parameters={"rope_theta": 1e6} | rope | {"rope_type": "yarn"})
    )


@pytest.mark.parametrize(
    "rope",
    [LLAMA3, LLAMA3 | {"high_freq_factor": 2, "low_freq_factor": 0.5}, LLAMA3 | {"factor": 32.0}],
)
def test_llama_3_with_other_constants(rope: dict[str, Any]) -> None:
    assert_same(
        config_json("llama", rope_parameters={"rope_type": "llama3", "rope_theta": 5e5} | rope)
    )


@pytest.mark.parametrize("model", ["qwen2", "qwen3"])
def test_qwens_way_to_131072_positions(model: str) -> None:
    """Their model cards add `rope_scaling` to a config.json that has rope_theta beside it."""
    added = {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
             "original_max_position_embeddings": 32768}}  # fmt: skip
    raw = config_json(model, max_position_embeddings=40960, **added)
    assert_same(raw)
    assert Architecture.from_config(raw).max_positions == 131072
    assert (
        Architecture.from_config(raw | {"max_position_embeddings": 200000}).max_positions == 200000
    )
    # by transformers 5
    rewritten = raw | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    del rewritten["rope_theta"]
    with pytest.raises(
        ConfigError, match=r"config.json: rope_scaling: given beside rope_parameters.* yarn .*take"
    ):
        Architecture.from_config(rewritten)
    assert of_transformers(rewritten)[0][1] != of_transformers(raw)[0][1], (
        "transformers lost rope_theta"
    )


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_scaling": "yarn"}, "rope_scaling: an object or null is required, found 'yarn'"),
        ({"rope_parameters": [1]}, r"rope_parameters: an object or null is required, found \[1\]"),
        ({"rope_theta": 0}, "config.json: rope_theta: a number above 1 is required, found 0"),
        ({"rope_theta": None}, "config.json: rope_theta: a number above 1 is required, found None"),
        (
            {"rope_theta": "1e6"},
            "config.json: rope_theta: a number above 1 is required, found '1e6'",
        ),
        ({"rope_theta": float("nan")}, "rope_theta: a number above 1 is required, found nan"),
        ({"rope_theta": True}, "rope_theta: a number above 1 is required, found True"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_parameters.rope_theta: a number above 1"),
        (
            {"rope_parameters": {"rope_type": None}},
            "rope_parameters.rope_type: None is not supported; supported: def",
        ),
        (
            {"rope_parameters": {"rope_type": ["yarn"]}},
            r"rope_parameters.rope_type: \['yarn'\] is not supported",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling.type: 'dynamic' is not .*it is default",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor: is not",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            "rope_parameters.factor: a number above 0 is required, found N",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 0.5}},
            "rope_scaling.factor: a number of at least 1 .*found 0.5",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": "4"}},
            "rope_scaling.factor: a number above 0 .*found '4'",
        ),
        (
            {"rope_scaling": {"type": "yarn", **YARN, "beta_slow": 40}},
            "rope_scaling.beta_fast: 32 is less than beta_s",
        ),
        (
            {"rope_scaling": {"type": "yarn", **YARN, "truncate": "no"}},
            "rope_scaling.truncate: true or false",
        ),
        (
            {"rope_scaling": {"type": "yarn", **YARN, "attn_factor": 1}},
            "rope_scaling.attn_factor: is not known for",
        ),
        (
            {"rope_scaling": {"type": "yarn", **YARN, "mscale_all_dim": 0}},
            "rope_scaling.mscale_all_dim: a number above",
        ),
        (
            {"rope_scaling": {"type": "yarn", **YARN, "attention_factor": 0}},
            "rope_scaling.attention_factor: a number",
        ),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 2,
                    "original_max_position_embeddings": 1.5,
                }
            },
            "an integer",
        ),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0}},
            "rope_scaling.low_freq_factor: a number above 0",
        ),
        (
            {"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1}},
            "high_freq_factor: a number above 1",
        ),
        (
            {"rope_scaling": {"type": "default", "factor": 2.0}},
            "rope_scaling.factor: is not known for rope_type 'def",
        ),
    ],
)
def test_fields_without_meaning_are_refused_by_key(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_rotary(config_json("llama", **rope), "config.json: ")
