"""A split that does not fit is refused before anything is built, with the key and what would
fit.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe import moe_utils

from megatron_efr.config import ConfigError, ModelConfig, ParallelConfig, check_parallel
from megatron_efr.policy import check_fit
from megatron_efr.weights.architecture import Architecture, Experts


@pytest.mark.parametrize(
    ("split", "world", "message"),
    [
        (
            {"tensor": 2, "pipeline": 2},
            6,
            r"parallel: tensor 2 x pipeline 2 x context 1 = 4 .* launch 8",
        ),
        ({"sequence": True}, 2, r"parallel\.sequence: .* set parallel\.tensor >= 2"),
        ({"virtual_pipeline": 2}, 2, r"parallel\.virtual_pipeline: needs parallel\.pipeline >= 2"),
        (
            {"pipeline": 2, "virtual_pipeline": 1},
            2,
            r"parallel\.virtual_pipeline: .* leave it out, or set 2",
        ),
        ({"expert": 4, "tensor": 2}, 4, r"parallel\.expert: .* = 2 ranks .* 1 or 2 would fit"),
    ],
)
def test_ranks_that_cannot_hold_the_split(split: dict[str, Any], world: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_parallel(ParallelConfig(**split), world)


@pytest.mark.parametrize(
    ("changes", "split", "message"),
    [
        (
            {},
            {"tensor": 3},
            r"parallel\.tensor: 4 attention heads .* over 3 ranks; 1, 2 or 4 would fit",
        ),
        (
            {},
            {"tensor": 2, "context": 4},
            r"parallel\.context: 4 .* 2 x context 4 = 8 .* context 1 or 2 would fit",
        ),
        (
            {"heads": 12, "kv_heads": 4},
            {"tensor": 6},
            r"parallel\.tensor: 4 key-value heads .* 1, 2, 4 or 12 would",
        ),
        (
            {"ffn": 98},
            {"tensor": 4},
            r"parallel\.tensor: the feed-forward width 98 .* 1 or 2 would fit",
        ),
        (
            {},
            {"pipeline": 3},
            r"parallel\.pipeline: 4 layers do not divide over 3 stages; 1, 2 or 4 would fit",
        ),
        (
            {},
            {"pipeline": 2, "virtual_pipeline": 3},
            r"parallel\.virtual_pipeline: a stage's 2 layers .* 1 or 2 would",
        ),
        (
            {},
            {"expert": 2},
            r"parallel\.expert: 2 ranks are to share experts, and the model has none; set it to 1",
        ),
    ],
)
def test_models_that_do_not_divide(
    changes: dict[str, Any], split: dict[str, Any], message: str, tied_model: Path
) -> None:
    architecture = replace(Architecture.from_folder(tied_model), **changes)
    with pytest.raises(ConfigError, match=message):
        check_fit(ModelConfig(path=str(tied_model)), ParallelConfig(**split), architecture)


EXPERTS = Experts(count=6, per_token=2, ffn=96, normalized=True)


@pytest.mark.parametrize(
    ("split", "megatron", "message"),
    [
        ({"expert": 4}, {}, r"parallel\.expert: 6 experts do not .* 4 ranks; 1, 2, 3 or 6 would"),
        (
            {"expert": 2, "tensor": 2},
            {},
            r"parallel\.sequence: experts under tensor parallelism .* set it to true",
        ),
        (
            {},
            {"moe_grouped_gemm": True},
            r"moe_grouped_gemm: grouped experts need Transformer Engine's layers",
        ),
        (
            {},
            {"moe_use_legacy_grouped_gemm": True},
            r"moe_use_legacy_grouped_gemm: .* needs the grouped_gemm package",
        ),
    ],
)
def test_experts_that_do_not_fit(
    split: dict[str, Any], megatron: dict[str, Any], message: str, tied_model: Path
) -> None:
    architecture = replace(Architecture.from_folder(tied_model), experts=EXPERTS)
    model = ModelConfig(path=str(tied_model), layers="local", megatron=megatron)
    with pytest.raises(ConfigError, match=message):
        check_fit(model, ParallelConfig(**split), architecture)
    check_fit(
        ModelConfig(path=str(tied_model)),
        ParallelConfig(expert=3, tensor=2, sequence=True),
        architecture,
    )


@pytest.mark.parametrize(
    "split", [{}, {"tensor": 4}, {"context": 4}, {"tensor": 2, "context": 2}, {"pipeline": 4}]
)
def test_what_fits_passes(split: dict[str, Any], tied_model: Path) -> None:
    check_fit(ModelConfig(path=str(tied_model)), ParallelConfig(**split))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("overlap_p2p_comm", "silently wrong without it"),
        ("batch_p2p_comm", "silently wrong with it"),
        ("microbatch_group_size_per_vp_stage", "groups of parallel.pipeline"),
        ("tensor_model_parallel_size", "set parallel.tensor instead"),
    ],
)
def test_megatron_fields_that_would_undo_the_split(
    field: str, message: str, tied_model: Path
) -> None:
    model = ModelConfig(path=str(tied_model), megatron={field: False})
    with pytest.raises(ConfigError, match=rf"model\.megatron\.{field}: .*{message}"):
        check_fit(model, ParallelConfig(pipeline=2, virtual_pipeline=2))


def test_transformer_engines_layers_are_refused_in_fp32_which_its_packed_attention_does_not_know(
    tied_model: Path,
) -> None:
    model = ModelConfig(path=str(tied_model), layers="transformer_engine")
    with pytest.raises(
        ConfigError, match=r"model\.layers: .* in 16 bits alone, and model\.dtype is float32"
    ):
        check_fit(model, ParallelConfig())


def test_experts_on_a_gpu_need_transformer_engine_if_megatrons_router_does(
    tied_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = Architecture.from_folder(tied_model)
    mixture = replace(dense, experts=EXPERTS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(moe_utils, "te_general_gemm", None, raising=False)
    check_fit(ModelConfig(path=str(tied_model)), ParallelConfig(), mixture)
    monkeypatch.delattr(moe_utils, "te_general_gemm")
    with pytest.raises(
        ConfigError, match=r"model\.path: a mixture of experts needs Transformer Engine on a GPU"
    ):
        check_fit(ModelConfig(path=str(tied_model)), ParallelConfig(), mixture)
