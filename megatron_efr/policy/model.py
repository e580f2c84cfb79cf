"""The Megatron model: its configuration from config.json's facts, its layers, its chunks on this
rank.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from megatron_efr.bfloat16_products import summed_in_float32
from megatron_efr.config import LoraConfig, ModelConfig, ParallelConfig
from megatron_efr.policy import cpu
from megatron_efr.policy.layers import local_layers
from megatron_efr.policy.lora import Adapters, adapt
from megatron_efr.policy.recomputed import use_swiglu
from megatron_efr.policy.settings import made
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.frequencies import inverse_frequencies
from megatron_efr.weights.mapping import WeightMapping
from megatron_efr.weights.tensor_parallel_split import padded_vocab

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PolicyModel(GPTModel):
    """Megatron's GPTModel whose last stage gives hidden states [tokens, 1, hidden]: the head lives
    in the loss.

    Megatron-Core 0.16.1 has no hook for a head of one's own, and its own head would hold every
    logit.
    """

    # PackedAttention turns queries and keys itself, with angles made once for all layers
    local_attention = False
    attention_factor = 1.0  # of rotated queries and keys

    def _preprocess(self, *args: Any, **inputs: Any) -> Any:
        prepared = super()._preprocess(*args, **inputs)
        if not self.local_attention:
            return prepared
        hidden, by_position, *rest = prepared  # [longest, 1, 1, head_dim]
        assert by_position is not None
        recomputed = self.config.recompute_granularity and torch.is_grad_enabled()
        # a later pipeline stage has no embedding, and its input has come with a gradient
        if recomputed and hidden is not None and not hidden.requires_grad:
            # of a frozen embedding: else what is recomputed has no gradient, silently
            hidden.requires_grad_()
        angles = by_position.index_select(0, inputs["position_ids"][0])[:, 0]
        # in the queries' dtype: cast in a layer, every layer would keep its own for the gradient
        inputs["packed_seq_params"].rotary = tuple(
            (turned * self.attention_factor).to(self.config.params_dtype)
            for turned in (angles.cos(), angles.sin())
        )
        return hidden, None, *rest

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    @property
    def adapters(self) -> Adapters | None:
        """The low-rank adapters that are trained in place of the weights, if any."""
        return cast(Adapters | None, self._modules.get("lora"))

    @property
    def head_weight(self) -> torch.nn.Parameter:
        """This rank's rows of the output layer [V / TP, hidden]; the embedding if they are tied.
        Last stage only.
        """
        if self.share_embeddings_and_output_weights:
            return cast(torch.nn.Parameter, self.shared_embedding_or_output_weight())
        return cast(torch.nn.Parameter, self.output_layer.weight)


def transformer_config(
    model: ModelConfig, architecture: Architecture, parallel: ParallelConfig
) -> TransformerConfig:
    """Megatron's configuration of this model and split; `model.megatron` overrides any field by its
    own name.
    """
    bf16 = model.dtype == "bfloat16"
    on_cpu = not torch.cuda.is_available()
    fields: dict[str, Any] = {
        **architecture_fields(architecture),
        # what the supported families have in common
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline,
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "sequence_parallel": parallel.sequence,
        "variable_seq_lengths": True,  # packs differ in length
        # required by variable_seq_lengths, for dense models too
        "moe_token_dispatcher_type": "alltoall",
        "moe_enable_routing_replay": model.routing == "replay",
        "pipeline_dtype": DTYPES[model.dtype],
        "params_dtype": DTYPES[model.dtype],
        "bf16": bf16,
        # our losses arrive normalised over the whole update: divide by nothing
        "calculate_per_token_loss": True,
        "perform_initialization": False,  # every weight is loaded, or drawn by name from the seed
        "use_cpu_initialization": on_cpu,
        "persist_layer_norm": not on_cpu,
        # in a float32 model it would save one addition, and no rounding
        "gradient_accumulation_fusion": on_cpu and bf16 and summed_in_float32(),
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
    }
    if parallel.virtual_pipeline is not None:
        # with Megatron's defaults the interleaved schedule is silently wrong
        fields |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    config = made(TransformerConfig, fields, "model.megatron", model.megatron)
    if (factor := architecture.rotary.attention_factor) != 1:
        # Megatron's own attention looks for these, which no configuration has, and takes 1 + 0.1
        # mscale ln(scaling)
        named: Any = config
        named.yarn_rotary_scaling_factor = math.e
        named.yarn_mscale = 10 * (factor - 1)
        named.yarn_mscale_all_dim = 0.0
    return config


def architecture_fields(architecture: Architecture) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig that this model decides alone, however it is split."""
    fields: dict[str, Any] = {
        "num_layers": architecture.layers,
        "hidden_size": architecture.hidden,
        "ffn_hidden_size": architecture.ffn,
        "num_attention_heads": architecture.heads,
        "num_query_groups": architecture.kv_heads,
        "kv_channels": architecture.head_dim,
        "layernorm_epsilon": architecture.norm_eps,
        "add_qkv_bias": architecture.qkv_bias,
        "qk_layernorm": architecture.qk_norm,
    }
    if (experts := architecture.experts) is not None:
        fields |= {
            "num_moe_experts": experts.count,
            "moe_router_topk": experts.per_token,
            "moe_ffn_hidden_size": experts.ffn,
            # softmax over the chosen experts is softmax over all, scaled to sum to 1 over the
            # chosen
            "moe_router_pre_softmax": not experts.normalized,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",  # rewards alone train the policy
        }
    return fields


def build_models(
    config: TransformerConfig,
    architecture: Architecture,
    parallel: ParallelConfig,
    use_te: bool,
    device: torch.device,
    lora: LoraConfig | None = None,
) -> list[PolicyModel]:
    """This rank's models (one, or one per virtual stage), with weights still to be loaded.

    Of Transformer Engine's layers (`use_te`), or of Megatron's and our own; with the adapters of
    `lora`, frozen.
    """
    mapping = WeightMapping(
        architecture,
        parallel.tensor,
        expert_ranks=parallel.expert,
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
    )
    models = []
    for stage in range(parallel.virtual_pipeline or 1):
        # one model for each virtual stage; only the outer ones have embedding and head
        vp_stage = stage if parallel.virtual_pipeline is not None else None
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        # logits stay split over the vocabulary: the head's kernels take them so
        model = PolicyModel(
            config=config,
            transformer_layer_spec=_layers(config, use_te, vp_stage),
            vocab_size=padded_vocab(architecture.vocab, parallel.tensor),
            max_sequence_length=architecture.max_positions,
            pre_process=first,
            post_process=last,
            parallel_output=True,
            share_embeddings_and_output_weights=architecture.tied,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        # Megatron computes Llama 3's scaling with one set of constants, and YaRN only for what its
        # own checkpoints need
        model.rotary_pos_emb.inv_freq = inverse_frequencies(
            architecture.rotary, architecture.head_dim
        ).to(device)
        # what our own attention and head have to know
        model.local_attention = not use_te
        if not use_te:
            use_swiglu(model)
        model.attention_factor = architecture.rotary.attention_factor
        _mark_split_weights(model)
        # all frozen but for adapters, which are split as the weights beside them
        if lora is not None:
            adapt(model, linear_layers(model, mapping), mapping, lora)
        if device.type == "cuda":
            model.cuda()
        models.append(model)
    return models


def build_chunks(
    config: TransformerConfig,
    architecture: Architecture,
    parallel: ParallelConfig,
    use_te: bool,
    device: torch.device,
    lora: LoraConfig | None = None,
) -> list[DistributedDataParallel]:
    """This rank's model chunks (one, or one per virtual stage), in DDP, with weights still to be
    loaded.
    """
    if config.bf16 and device.type == "cpu":
        cpu.multiply_bfloat16()
    ddp = ddp_config(parallel)
    wrapped = []
    for number, model in enumerate(
        build_models(config, architecture, parallel, use_te, device, lora)
    ):
        module = Float16Module(config, model) if config.bf16 else model
        wrapped.append(DistributedDataParallel(config, ddp, module, disable_bucketing=number > 0))
    no_sync: Any = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    config.no_sync_func = no_sync
    config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def canonical_parameters(
    model: PolicyModel, mapping: WeightMapping
) -> dict[str, torch.nn.Parameter]:
    """This model's parameters by their names in the whole model; without adapters."""
    found = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            layer: Any = model.decoder.layers[int(parts[2])]
            parts[2] = str(layer.layer_number - 1)
        if parts[0] != "lora":
            found[mapping.canonical(".".join(parts))] = parameter
    return found


def linear_layers(
    model: PolicyModel, mapping: WeightMapping
) -> dict[str, ColumnParallelLinear | RowParallelLinear]:
    """The model's linear layers by their weights' names in the whole model."""
    by_weight = {
        id(module.weight): module
        for module in model.modules()
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear))
        and module.weight is not None
    }
    named = canonical_parameters(model, mapping).items()
    return {
        name: by_weight[id(parameter)] for name, parameter in named if id(parameter) in by_weight
    }


def _mark_split_weights(model: PolicyModel) -> None:
    """Say which weights are tensor-parallel shards.

    Megatron does so while initialising them, which is off; without the mark the gradient norm
    leaves out every shard but rank 0's, silently.
    """
    dims = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if (
            type(module) in dims
            and weight is not None
            and not hasattr(weight, "tensor_model_parallel")
        ):
            set_tensor_model_parallel_attributes(weight, True, dims[type(module)], 1)


def ddp_config(parallel: ParallelConfig) -> DistributedDataParallelConfig:
    """Megatron's DDP settings; `parallel.ddp` overrides any field by its own name."""
    return made(
        DistributedDataParallelConfig, {"grad_reduce_in_fp32": True}, "parallel.ddp", parallel.ddp
    )


def _layers(
    config: TransformerConfig, use_te: bool, vp_stage: int | None
) -> (
    Any
):  # a ModuleSpec, or TransformerBlockSubmodules: GPTModel takes both, its annotation names one
    if use_te:
        from megatron.core.models.gpt.gpt_layer_specs import (
            get_gpt_layer_with_transformer_engine_spec,
        )

        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    return local_layers(config, get_num_layers_to_build(config, vp_stage=vp_stage))
