"""Whether a model divides over a split, asked before anything is built: the answer names the key and what would fit."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch

from megatron_efr.config import ConfigError, ModelConfig, ParallelConfig
from megatron_efr.weights.architecture import Architecture

# fields of Megatron's TransformerConfig that are set elsewhere, or that the policy stands on
_PARALLEL = {
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "context_parallel_size": "parallel.context",
    "expert_model_parallel_size": "parallel.expert",
    "sequence_parallel": "parallel.sequence",
}
_FIXED = {
    "overlap_p2p_comm": "the interleaved pipeline schedule is silently wrong without it",
    "batch_p2p_comm": "the interleaved pipeline schedule is silently wrong with it",
    "microbatch_group_size_per_vp_stage": "micro-batches come in groups of parallel.pipeline",
    "variable_seq_lengths": "packed micro-batches differ in length",
    "moe_token_dispatcher_type": "packed micro-batches differ in length, which only alltoall allows",
    "expert_tensor_parallel_size": "experts are split over parallel.tensor",
    "hierarchical_context_parallel_sizes": "sequences are split over parallel.context",
}
_UNEVEN_STAGES = (  # with one of these Megatron divides layers over stages by a rule of its own, and checks it
    "pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


def check_fit(model: ModelConfig, parallel: ParallelConfig, architecture: Architecture | None = None) -> None:
    """ConfigError where the model (`model.path`'s, unless `architecture` is given) does not divide over `parallel`."""
    architecture = architecture or Architecture.from_folder(model.path)
    _check_owned_fields(model.megatron)
    _check_heads(architecture, parallel, needs_exchange=not engine_layers(model.layers))
    _check_width(architecture, parallel)
    if not model.megatron.keys() & set(_UNEVEN_STAGES):
        _check_layers(architecture.layers, parallel)
    _check_experts(architecture.experts.count if architecture.experts else None, parallel)
    if architecture.experts and torch.cuda.is_available() and not _engine_imports():
        raise ConfigError(
            "model.path: a mixture of experts needs Transformer Engine on a GPU (megatron-core 0.16.1's router calls "
            "it, whatever the layers); install the gpu extra"
        )


def engine_layers(layers: str) -> bool:
    """Whether Transformer Engine's layers are used; ConfigError where they are asked for and cannot be."""
    present = _engine_imports() and torch.cuda.is_available()
    if layers == "transformer_engine" and not present:
        raise ConfigError(
            "model.layers: transformer_engine is asked for, and it (or CUDA) is not here; use auto or local"
        )
    return present and layers != "local"


def _engine_imports() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def _check_owned_fields(megatron: dict[str, Any]) -> None:
    for name in sorted(megatron.keys() & _PARALLEL.keys()):
        raise ConfigError(f"model.megatron.{name}: set {_PARALLEL[name]} instead")
    for name in sorted(megatron.keys() & _FIXED.keys()):
        raise ConfigError(f"model.megatron.{name}: cannot be changed: {_FIXED[name]}; leave it out")


def _check_heads(architecture: Architecture, parallel: ParallelConfig, needs_exchange: bool) -> None:
    heads, kv_heads, tensor, context = architecture.heads, architecture.kv_heads, parallel.tensor, parallel.context
    if heads % tensor:
        raise ConfigError(
            f"parallel.tensor: {heads} attention heads do not divide over {tensor} ranks; {_fitting(heads)} would fit"
        )
    if needs_exchange and heads % (tensor * context):
        raise ConfigError(
            f"parallel.context: {heads} attention heads do not divide over tensor {tensor} x context {context} = "
            f"{tensor * context} ranks, and without Transformer Engine context parallelism splits heads; with tensor "
            f"{tensor}, context {_fitting(heads // tensor)} would fit"
        )
    if kv_heads % tensor and tensor % kv_heads:
        fitting = [t for t in range(1, heads + 1) if heads % t == 0 and (kv_heads % t == 0 or t % kv_heads == 0)]
        raise ConfigError(
            f"parallel.tensor: {kv_heads} key-value heads neither divide over {tensor} ranks nor divide {tensor}; "
            f"{_either(fitting)} would fit"
        )


def _check_width(architecture: Architecture, parallel: ParallelConfig) -> None:
    # the vocabulary is padded until it divides
    ffn = architecture.experts.ffn if architecture.experts else architecture.ffn
    qkv = (architecture.heads + 2 * architecture.kv_heads) * architecture.head_dim
    for rows, what in ((ffn, "the feed-forward width"), (qkv, "the rows of queries, keys and values together,")):
        if rows % parallel.tensor:
            raise ConfigError(
                f"parallel.tensor: {what} {rows} does not divide over {parallel.tensor} ranks; "
                f"{_fitting(math.gcd(rows, architecture.heads))} would fit"
            )


def _check_layers(layers: int, parallel: ParallelConfig) -> None:
    if layers % parallel.pipeline:
        raise ConfigError(
            f"parallel.pipeline: {layers} layers do not divide over {parallel.pipeline} stages; {_fitting(layers)} "
            "would fit (or uneven stages, by model.megatron.num_layers_in_first_pipeline_stage and its like)"
        )
    per_stage = layers // parallel.pipeline
    if parallel.virtual_pipeline is not None and per_stage % parallel.virtual_pipeline:
        raise ConfigError(
            f"parallel.virtual_pipeline: a stage's {per_stage} layers (of {layers}, over parallel.pipeline "
            f"{parallel.pipeline}) do not divide into {parallel.virtual_pipeline} chunks; {_fitting(per_stage)} "
            "would fit"
        )


def _check_experts(experts: int | None, parallel: ParallelConfig) -> None:
    if not experts:
        if parallel.expert > 1:
            raise ConfigError(
                f"parallel.expert: {parallel.expert} ranks are to share experts, and the model has none; set it to 1"
            )
        return
    if experts % parallel.expert:
        raise ConfigError(
            f"parallel.expert: {experts} experts do not divide over {parallel.expert} ranks; {_fitting(experts)} "
            "would fit"
        )
    if parallel.tensor > 1 and not parallel.sequence:
        raise ConfigError(
            "parallel.sequence: experts under tensor parallelism need sequence parallelism; set it to true"
        )


def _fitting(number: int) -> str:
    """The divisors of `number` in words."""
    return _either([d for d in range(1, number + 1) if number % d == 0])


def _either(choices: list[int]) -> str:
    return str(choices[0]) if len(choices) == 1 else f"{', '.join(map(str, choices[:-1][:7]))} or {choices[-1]}"
