"""Layers that need no Transformer Engine: RMSNorm under sequence parallelism, and attention over packed sequences."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch.nn.functional import scaled_dot_product_attention

from megatron_efr.policy.context import heads_for_tokens, rank_order, tokens_for_heads

_WASTE = 0.8  # sequences share a padded batch when the shortest is at least this fraction of the longest


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with Megatron's constructor, and a weight that Megatron reduces under sequence parallelism.

    Megatron's own wrapper refuses sequence parallelism, so this one stands in for it everywhere, the final norm too.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


@dataclass(frozen=True)
class LengthBucket:
    """Sequences of similar length, padded to one rectangle: `rows` [n, longest] into the pack, `real` into its cells.

    Padding repeats a sequence's last row: it stands after every real token, so causal attention never sees it.
    """

    rows: torch.Tensor
    real: torch.Tensor


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of a pack, with the rectangles that attention without varlen kernels works on.

    The rectangles' real rows, one after the other, stand in the order of the attention's input once indexed with
    `restore` [tokens]: the pack's own order, or under context parallelism the ranks' slices one after the other.
    """

    buckets: list[LengthBucket] = field(default_factory=list)
    restore: torch.Tensor | None = None


def packed_sequences(lengths: list[int], cu_seqlens: torch.Tensor, context_ranks: int = 1) -> PackedSequences:
    """Describe a pack of whole sequences of these `lengths`; `cu_seqlens` int32 [sequences + 1] are their bounds.

    Under context parallelism the lengths are multiples of 2 * `context_ranks`, padding at a sequence's end included:
    the tokens before it never see it, so Megatron and Transformer Engine may take it for tokens.
    """
    buckets = _bucket_by_length(lengths, cu_seqlens.device)
    if context_ranks > 1:  # the rectangles read from, and write to, the ranks' slices: reordering costs nothing more
        place = rank_order(lengths, context_ranks).to(cu_seqlens.device)
        buckets = [LengthBucket(rows=place[bucket.rows], real=bucket.real) for bucket in buckets]
    source = torch.cat([bucket.rows.flatten()[bucket.real] for bucket in buckets])
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        buckets=buckets,
        restore=torch.empty_like(source).scatter_(0, source, torch.arange(len(source), device=source.device)),
    )


def _bucket_by_length(lengths: list[int], device: torch.device) -> list[LengthBucket]:
    """Group a pack's sequences into rectangles that waste little."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    buckets: list[list[int]] = []
    for i in order:
        if buckets and lengths[i] >= _WASTE * lengths[buckets[-1][0]]:
            buckets[-1].append(i)
        else:
            buckets.append([i])
    return [_rectangle([starts[i] for i in bucket], [lengths[i] for i in bucket], device) for bucket in buckets]


def _rectangle(starts: list[int], lengths: list[int], device: torch.device) -> LengthBucket:
    start = torch.tensor(starts, device=device)[:, None]
    length = torch.tensor(lengths, device=device)[:, None]
    column = torch.arange(max(lengths), device=device)[None]
    rows = start + torch.minimum(column, length - 1)
    return LengthBucket(rows=rows, real=(column < length).flatten().nonzero()[:, 0])


class PackedAttention(MegatronModule):
    """Causal attention within each sequence of a pack, over torch's scaled_dot_product_attention.

    Takes query `[tokens, heads, head_dim]`, key and value `[tokens, kv groups, head_dim]` of this rank, returns
    `[tokens, heads * head_dim]`. Stands where Megatron's DotProductAttention stands, which knows no packing.
    Under context parallelism each rank brings its slice of the tokens, trades it for whole sequences of some of the
    heads (Jacobs et al. 2023, DeepSpeed-Ulysses), and trades the result back.
    """

    context: dist.ProcessGroup | None = None

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale
        if config.context_parallel_size > 1:
            assert pg_collection is not None
            self.context = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> torch.Tensor:
        if packed_seq_params is None:
            raise ValueError("PackedAttention works on packed sequences; packed_seq_params is missing")
        if self.context is not None:
            query, key, value = tokens_for_heads(query, key, value, self.context)
        repeat = query.shape[1] // key.shape[1]
        outputs = []
        for bucket in packed_seq_params.buckets:
            q, k, v = (self._rectangle(x, bucket) for x in (query, key, value))
            if repeat > 1:
                k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
            attended = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
            attended = attended.transpose(1, 2).flatten(0, 1)  # [n * longest, heads, head_dim]
            outputs.append(attended.index_select(0, bucket.real))
        assert packed_seq_params.restore is not None
        attended = torch.cat(outputs).index_select(0, packed_seq_params.restore)
        return (attended if self.context is None else heads_for_tokens(attended, self.context)).flatten(1)

    @staticmethod
    def _rectangle(x: torch.Tensor, bucket: LengthBucket) -> torch.Tensor:
        """[tokens, heads, dim] -> [n, heads, longest, dim]."""
        n, longest = bucket.rows.shape
        return x.index_select(0, bucket.rows.flatten()).view(n, longest, *x.shape[1:]).transpose(1, 2)


def local_layers(config: TransformerConfig, stage_layers: int) -> TransformerBlockSubmodules:
    """A stage's layers from Megatron's local parts, with the norm and attention above in place of its own."""
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    layer = copy(layer)
    parts: Any = copy(layer.submodules)
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    parts.self_attention = copy(parts.self_attention)
    attention = parts.self_attention.submodules = copy(parts.self_attention.submodules)
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layer.submodules = parts
    final_norm: Any = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * stage_layers, layer_norm=final_norm)
