"""Bytes of a run's tensors by part and phase of a step, on GPUs or a CPU, by formula; and the size
of micro-batch that follows if none is asked for.

Formulas say what tensors must be there at once. Fragmentation, workspaces and what a library keeps
for itself are not in them, but for OVERHEAD, which is an assumption.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_efr.config import LoraConfig, ParallelConfig
from megatron_efr.kernels.linear_logprob import default_chunk
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.mapping import WeightMapping

BYTES = {"float32": 4, "bfloat16": 2}
MICRO_BATCH_TOKENS = 16384
# of a micro-batch on a CPU: an update takes about a tenth longer than with larger ones
ACTIVATIONS_CPU = 3 * 2**28
# CUDA context, NCCL buffers, workspaces, of each process: an assumption
OVERHEAD = int(1.5 * 2**30)


def parameter_count(architecture: Architecture) -> int:
    """Parameters of the whole model, tied embeddings once; exact: the sizes of the Hugging Face
    tensors.
    """
    return sum(math.prod(shape) for shape in WeightMapping(architecture).shapes().values())


def trained_count(architecture: Architecture, lora: LoraConfig | None) -> int:
    """Parameters that have gradients and optimizer state: all, or the adapters' A and B alone."""
    if lora is None:
        return parameter_count(architecture)
    shapes = WeightMapping(architecture).shapes().items()
    ends = tuple(f"{target}.weight" for target in lora.targets)
    return sum(lora.rank * sum(shape) for name, shape in shapes if name.endswith(ends))


def held_count(architecture: Architecture, lora: LoraConfig | None) -> int:
    """Parameters of the whole model, with the adapters beside them if there are any."""
    adapters = 0 if lora is None else trained_count(architecture, lora)
    return parameter_count(architecture) + adapters


def stage_parameters(architecture: Architecture, parallel: ParallelConfig) -> list[tuple[int, int]]:
    """(parameters, experts' among them) of one rank of each pipeline stage; exact for stages of
    equal layers.

    The vocabulary is padded as Megatron pads it; tied embeddings stand on the first stage and,
    apart, on the last.
    """
    mapping = WeightMapping(architecture, parallel.tensor, expert_ranks=parallel.expert)
    per_stage = architecture.layers // parallel.pipeline
    stages = [[0, 0] for _ in range(parallel.pipeline)]
    for name in mapping.parameters():
        size = math.prod(mapping.shape(name)) // (
            parallel.tensor if mapping.is_sharded(name) else 1
        )
        if name.startswith("decoder.layers."):
            stage = int(name.split(".")[2]) // per_stage
            rank = mapping.expert_rank(name)
            if rank in (None, 0):  # every expert-parallel rank holds as many as the first
                stages[stage][0] += size
                stages[stage][1] += 0 if rank is None else size
        elif name.startswith("embedding."):
            stages[0][0] += size
            if architecture.tied and parallel.pipeline > 1:
                stages[-1][0] += size
        else:
            stages[-1][0] += size
    return [(total, experts) for total, experts in stages]


def optimizer_bytes(parameters: int, dtype: str, shards: int = 1) -> int:
    """Adam's two moments in fp32, and the fp32 weights if the model's are bf16, over `shards`
    ranks.

    12 or 8 bytes a parameter: Rajbhandari et al. 2020 (ZeRO), section 3.1; sharded as Megatron's
    distributed optimizer.
    """
    return (12 if dtype == "bfloat16" else 8) * parameters // shards


def gradient_bytes(parameters: int) -> int:
    """Megatron's buffer of main gradients: fp32 (`grad_reduce_in_fp32`), whole on every rank."""
    return 4 * parameters


def layer_activation_bytes(
    architecture: Architecture, parallel: ParallelConfig, dtype: str, local: bool = False
) -> float:
    """Bytes that one token leaves in one layer for its backward pass, on one rank.

    Counted as Korthikanti et al. 2022 (section 4) count, for this layer: RMSNorm, grouped queries,
    SwiGLU, attention that keeps no scores (Dao et al. 2022). Kept are: both norms' inputs and
    outputs (4 hidden); queries and keys before norms of their own (q + kv); rotated queries and
    keys, values, attention's result (2 q + 2 kv) with its fp32 log-sums (heads); each chosen
    expert's input (hidden); Megatron-Core 0.16.1's unfused SwiGLU (gate and up, SiLU(gate), a copy
    of up, the product: 5 ffn, of each chosen expert). `local` layers keep fp32 factors of the
    norms' rows, keys and values repeated for every query, and the result twice (5 q), but of SwiGLU
    only gate, up and the product (3 ffn; an expert's also before it is weighted).
    Tensor ranks divide all but the norms', which sequence parallelism divides too.
    """
    a = architecture
    width = BYTES[dtype]
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    ffn = a.experts.ffn * a.experts.per_token if a.experts else a.ffn
    norms = (4 * a.hidden * width + 8 * local) / (parallel.tensor if parallel.sequence else 1)
    attention = 5 * q if local else 2 * q + 2 * kv
    factors = 0
    if a.qk_norm:
        attention += q + kv
        factors = (a.heads + a.kv_heads) * local
    glu = (4 if a.experts else 3) * ffn if local else 5 * ffn
    given = a.experts.per_token * a.hidden if a.experts else 0
    split = (attention + given + glu) * width + 4 * (a.heads + factors)
    return norms + split / parallel.tensor


def attention_share(architecture: Architecture, parallel: ParallelConfig, dtype: str) -> float:
    """The part of `local` layers' activations that attention keeps of every token of every
    sequence, also of a prompt that several share and that is laid once: queries, repeated keys and
    values, its result (4 q), log-sums.
    """
    a = architecture
    kept = (4 * a.heads * a.head_dim * BYTES[dtype] + 4 * a.heads) / parallel.tensor
    return kept / layer_activation_bytes(architecture, parallel, dtype, local=True)


def activation_bytes(
    architecture: Architecture,
    parallel: ParallelConfig,
    dtype: str,
    tokens: int,
    *,
    recompute: bool,
    local: bool = False,
) -> int:
    """Bytes that a micro-batch of `tokens` leaves on a full pipeline's first stage (1F1B: as many
    micro-batches as there are stages). With full recompute each layer keeps its input alone, and
    one is whole.
    """
    own = tokens / parallel.context
    layers = architecture.layers / parallel.pipeline
    in_flight = parallel.pipeline
    layer = layer_activation_bytes(architecture, parallel, dtype, local)
    if not recompute:
        return int(own * layers * layer * in_flight)
    entry = architecture.hidden * BYTES[dtype] / (parallel.tensor if parallel.sequence else 1)
    return int(own * (layers * entry * in_flight + layer))


def micro_batch_tokens(
    architecture: Architecture, parallel: ParallelConfig, dtype: str, on_gpu: bool
) -> int:
    """The token budget of a micro-batch if none is configured."""
    if on_gpu:
        return MICRO_BATCH_TOKENS
    token = activation_bytes(architecture, parallel, dtype, 1, recompute=False, local=True)
    return max(1, min(MICRO_BATCH_TOKENS, ACTIVATIONS_CPU // token))


def head_bytes(
    architecture: Architecture,
    parallel: ParallelConfig,
    dtype: str,
    tokens: int,
    training: bool,
    frozen: bool = False,
) -> int:
    """The log-prob head (`kernels.linear_logprob`) on the last stage, over a micro-batch of
    `tokens`.

    One chunk of fp32 logits (`default_chunk` tokens on a GPU) and the hidden states [tokens,
    hidden], gathered from the sequence-parallel ranks; in training also the latter's gradient and,
    unless the weight is `frozen`, its own in fp32 and as it leaves.
    """
    a = architecture
    width = BYTES[dtype]
    vocab = WeightMapping(a, parallel.tensor).padded_vocab // parallel.tensor
    own = tokens // parallel.context
    chunk = default_chunk(vocab, parallel.tensor, torch.device("cuda"))
    forward = 4 * min(chunk, own) * vocab + own * a.hidden * width
    if not training:
        return forward
    return forward + own * a.hidden * width + (0 if frozen else vocab * a.hidden * (4 + width))


def kv_bytes_per_token(architecture: Architecture, engine_ranks: int, dtype: str) -> int:
    """Keys and values of one token in all layers, on one GPU of an engine; KV heads fewer than
    ranks are repeated.
    """
    heads = max(architecture.kv_heads // engine_ranks, 1)
    return 2 * architecture.layers * heads * architecture.head_dim * BYTES[dtype]


def checkpoint_bytes(architecture: Architecture, dtype: str, lora: LoraConfig | None = None) -> int:
    """One checkpoint on disk: the weights, adapters too, and the optimizer's state once."""
    held, trained = held_count(architecture, lora), trained_count(architecture, lora)
    return held * BYTES[dtype] + optimizer_bytes(trained, dtype)


def largest_tensor_bytes(architecture: Architecture, dtype: str) -> int:
    """The largest whole Hugging Face tensor: what a publication holds beside its two buckets."""
    return BYTES[dtype] * max(
        math.prod(shape) for shape in WeightMapping(architecture).shapes().values()
    )


@dataclass(frozen=True, slots=True)
class Shape:
    """Arguments of a colocated step's plan. Bytes are of one GPU; MiB, GiB are powers of two."""

    architecture: Architecture
    parallel: ParallelConfig
    dtype: str
    world: int
    micro_batch_tokens: int
    recompute: bool
    local_layers: bool
    sharded_optimizer: bool
    engine_ranks: int
    # of the GPU, for the engine's weights and KV cache: SGLang's mem_fraction_static
    static_fraction: float
    bucket_bytes: int
    gpu_bytes: int
    keeps_reference: bool
    lora: LoraConfig | None = None


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a step, by the name under which a run times it, and the bytes of each part that
    is on the fullest GPU when it ends.
    """

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The phases of a colocated step on one GPU, and what lies outside it."""

    phases: list[Phase]
    # that one engine's KV cache holds; negative if its weights alone pass the static fraction
    kv_tokens: int
    # of one rank: the reference, the weights it changes places with, gradients and optimizer
    # offloaded
    host_bytes: int


def plan(shape: Shape) -> MemoryPlan:
    """The memory of every phase; the stage with the most parameters stands for all."""
    a, parallel, dtype = shape.architecture, shape.parallel, shape.dtype
    own, experts = max(stage_parameters(a, parallel))
    # weights, gradients and optimizer: the stage that has most of them
    shared = shape.world // (parallel.tensor * parallel.pipeline)  # data x context ranks
    dense_shards, expert_shards = (
        (shared, shared // parallel.expert) if shape.sharded_optimizer else (1, 1)
    )
    held = own
    # frozen weights, and adapters, which no expert has; tensor ranks split one side of them
    if shape.lora is not None:
        own, experts = trained_count(a, shape.lora) // parallel.pipeline, 0
        held += own
    states = optimizer_bytes(own - experts, dtype, dense_shards) + optimizer_bytes(
        experts, dtype, expert_shards
    )
    weights = {"parameters": held * BYTES[dtype], "overhead": 2 * OVERHEAD}
    training = weights | {"gradients": gradient_bytes(own), "optimizer": states}
    # the head and activations of one micro-batch
    scored = training | {
        "head": head_bytes(a, parallel, dtype, shape.micro_batch_tokens, training=False)
    }
    frozen = shape.lora is not None
    head = head_bytes(a, parallel, dtype, shape.micro_batch_tokens, training=True, frozen=frozen)
    trained = training | {"head": head}
    tokens, local = shape.micro_batch_tokens, shape.local_layers
    one_layer = layer_activation_bytes(a, parallel, dtype, local) * tokens / parallel.context
    kept = activation_bytes(a, parallel, dtype, tokens, recompute=shape.recompute, local=local)
    # the engine's part, and the buckets of a publication
    engine = parameter_count(a) * BYTES[dtype] // shape.engine_ranks
    served = weights | {"engine weights": engine}
    cache = int(shape.static_fraction * shape.gpu_bytes) - engine
    serving = served | {"KV cache": max(cache, 0)}
    buckets = {"buckets": 2 * shape.bucket_bytes + largest_tensor_bytes(a, dtype)}
    # what each phase holds on the GPU when it ends
    phases = [
        Phase("rollout", serving),
        Phase("release", weights),
        Phase("restore", training),
        Phase("logprobs", scored | {"activations": int(one_layer)}),
        Phase("train", trained | {"activations": kept}),
        Phase("offload", weights),
        Phase("wake", served),
        Phase("publish", served | buckets),
        Phase("resume", serving),
    ]
    # a reference, and the weights it changes places with; adapters are only turned off
    reference = 2 * weights["parameters"] if shape.keeps_reference and not frozen else 0
    host = reference + training["gradients"] + states
    return MemoryPlan(phases, cache // kv_bytes_per_token(a, shape.engine_ranks, dtype), host)
