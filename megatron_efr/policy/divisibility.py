"""Checks that a model divides over a split before anything is built: the answer names the key and
what would fit.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils

from megatron_efr import transformer_engine
from megatron_efr.config import ConfigError, LoraConfig, ModelConfig, ParallelConfig
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.divisibility import check_split, divisors

# fields of Megatron's TransformerConfig that are set elsewhere, or that the policy stands on
_ELSEWHERE = {
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "context_parallel_size": "parallel.context",
    "expert_model_parallel_size": "parallel.expert",
    "sequence_parallel": "parallel.sequence",
    "moe_enable_routing_replay": "model.routing",
}
_FIXED = {
    "overlap_p2p_comm": "the interleaved pipeline schedule is silently wrong without it",
    "batch_p2p_comm": "the interleaved pipeline schedule is silently wrong with it",
    "microbatch_group_size_per_vp_stage": "micro-batches come in groups of parallel.pipeline",
    "variable_seq_lengths": "packed micro-batches differ in length",
    "moe_token_dispatcher_type": (
        "packed micro-batches differ in length, which only alltoall allows"
    ),
    "expert_tensor_parallel_size": "experts are split over parallel.tensor",
    "hierarchical_context_parallel_sizes": "sequences are split over parallel.context",
}
# with one of these Megatron divides layers over stages by a rule of its own, and checks it
_UNEVEN_STAGES = (
    "pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


def check_fit(
    model: ModelConfig, parallel: ParallelConfig, architecture: Architecture | None = None
) -> None:
    """ConfigError if the model (`model.path`'s, unless `architecture` is given) does not divide
    over `parallel`.
    """
    architecture = architecture or Architecture.from_folder(model.path)
    _check_owned_fields(model.megatron)
    check_split(architecture, parallel.tensor, parallel.expert)
    if model.lora is not None:
        _check_lora(model, model.lora, parallel, architecture)
    if not te_layers(model):
        _check_context(architecture.heads, parallel)
    if not model.megatron.keys() & set(_UNEVEN_STAGES):
        _check_layers(architecture.layers, parallel)
    if architecture.experts:
        _check_experts(model, parallel)
    if model.routing == "replay":
        _check_replay(architecture, model.megatron)


def te_layers(model: ModelConfig) -> bool:
    """True if Transformer Engine's layers are used; ConfigError if they are asked for and cannot
    be.

    Its attention over packed sequences (flash attention or cuDNN's) knows 16-bit numbers alone.
    """
    if model.layers == "transformer_engine":
        if model.dtype != "bfloat16":
            raise ConfigError(
                "model.layers: transformer_engine attends to packed sequences in 16 bits alone, "
                f"and model.dtype is {model.dtype}; use auto or local, or train in bfloat16"
            )
        if not _te_is_here():
            raise ConfigError(
                "model.layers: transformer_engine is set, and Transformer Engine or CUDA is "
                "missing; use auto or local"
            )
    return te_layers_suit(model) and _te_is_here()


def te_layers_suit(model: ModelConfig) -> bool:
    """True if Transformer Engine's layers are used wherever it is installed, on a GPU. Adapters are
    beside Megatron's own linear layers.
    """
    return model.layers != "local" and model.lora is None and model.dtype == "bfloat16"


def _te_is_here() -> bool:
    return transformer_engine.WORKS and torch.cuda.is_available()


def _check_owned_fields(megatron: dict[str, Any]) -> None:
    for name in sorted(megatron.keys() & _ELSEWHERE.keys()):
        raise ConfigError(f"model.megatron.{name}: set {_ELSEWHERE[name]} instead")
    for name in sorted(megatron.keys() & _FIXED.keys()):
        raise ConfigError(f"model.megatron.{name}: cannot be changed: {_FIXED[name]}; leave it out")


def _check_context(heads: int, parallel: ParallelConfig) -> None:
    tensor, context = parallel.tensor, parallel.context
    if heads % (tensor * context):
        raise ConfigError(
            f"parallel.context: {heads} attention heads do not divide over tensor {tensor} x "
            f"context {context} = {tensor * context} ranks, and without Transformer Engine "
            f"context parallelism splits heads; with tensor {tensor}, context "
            f"{divisors(heads // tensor)} would fit"
        )


def _check_layers(layers: int, parallel: ParallelConfig) -> None:
    if layers % parallel.pipeline:
        raise ConfigError(
            f"parallel.pipeline: {layers} layers do not divide over {parallel.pipeline} stages; "
            f"{divisors(layers)} would fit (or uneven stages, by "
            "model.megatron.num_layers_in_first_pipeline_stage and its like)"
        )
    per_stage = layers // parallel.pipeline
    if parallel.virtual_pipeline is not None and per_stage % parallel.virtual_pipeline:
        raise ConfigError(
            f"parallel.virtual_pipeline: a stage's {per_stage} layers (of {layers}, over "
            f"parallel.pipeline {parallel.pipeline}) do not divide into "
            f"{parallel.virtual_pipeline} chunks; {divisors(per_stage)} would fit"
        )


def _check_experts(model: ModelConfig, parallel: ParallelConfig) -> None:
    if parallel.tensor > 1 and not parallel.sequence:
        raise ConfigError(
            "parallel.sequence: experts under tensor parallelism need sequence parallelism; set "
            "it to true"
        )
    if model.megatron.get("moe_use_legacy_grouped_gemm"):
        raise ConfigError(
            "model.megatron.moe_use_legacy_grouped_gemm: Megatron's GroupedMLP needs the "
            "grouped_gemm package and is superseded; with Transformer Engine's layers set "
            "moe_grouped_gemm alone, without them leave both out"
        )
    if model.megatron.get("moe_grouped_gemm") and not te_layers(model):
        raise ConfigError(
            "model.megatron.moe_grouped_gemm: grouped experts need Transformer Engine's layers, "
            "CUDA and bfloat16, and these are local ones, whose experts are computed one by one; "
            "leave it out, or install the gpu extra"
        )
    if torch.cuda.is_available() and not hasattr(moe_utils, "te_general_gemm"):
        raise ConfigError(
            "model.path: a mixture of experts needs Transformer Engine on a GPU (the router of "
            f"megatron-core {version('megatron-core')} calls it, whatever the layers); install "
            "the gpu extra"
        )


def _check_lora(
    model: ModelConfig, lora: LoraConfig, parallel: ParallelConfig, architecture: Architecture
) -> None:
    if model.layers == "transformer_engine":
        raise ConfigError(
            "model.lora: adapters stand beside Megatron's own linear layers, and Transformer "
            "Engine's join a norm and a product; set model.layers to auto or local"
        )
    attention = [name for name in lora.targets if name.startswith(("q_", "k_", "v_", "o_"))]
    if architecture.experts and attention != lora.targets:
        others = ", ".join(name for name in lora.targets if name not in attention)
        raise ConfigError(
            f"model.lora.targets: {others} are the experts' in this model, which get no adapters; "
            "name attention's projections alone: "
            f"{', '.join(attention) or 'q_proj, k_proj, v_proj, o_proj'}"
        )
    if parallel.expert > 1:
        raise ConfigError(
            f"parallel.expert: {parallel.expert} ranks would share experts, and adapters "
            "(model.lora) are trained by ranks that hold all of them; set it to 1"
        )
    if architecture.kv_heads % parallel.tensor and set(attention) - {"o_proj"}:
        raise ConfigError(
            "model.lora.targets: q_proj, k_proj and v_proj have adapters on whole KV heads, and "
            f"the model's {architecture.kv_heads} do not divide over parallel.tensor "
            f"{parallel.tensor}; with tensor {divisors(architecture.kv_heads)} they would, or "
            "leave these three out"
        )


def _check_replay(architecture: Architecture, megatron: dict[str, Any]) -> None:
    if architecture.experts is None:
        raise ConfigError(
            "model.routing: replay is for a mixture of experts, and the model has none; leave it "
            "out"
        )
    if megatron.get("moe_router_fusion"):
        raise ConfigError(
            "model.megatron.moe_router_fusion: Transformer Engine's fused router replays nothing, "
            "silently; leave it out, or set model.routing to own"
        )
