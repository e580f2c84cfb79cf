"""Layers that need no Transformer Engine: attention over packed sequences, and the layer that it
stands in.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
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
from megatron_efr.policy.recomputed import RMSNorm, rotated

# sequences share a padded batch when the shortest is at least this fraction of the longest
_WASTE = 0.8


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of a pack, with the padded rectangles that attention without varlen
    kernels works on.

    `rectangles` are (sequences, longest) each, their cells one after the other: cell c holds token
    `cells[c]` of the attention's input, and token t of it stands in cell `places[t]`. Padding
    repeats a sequence's last token behind it, so causal attention lets no real token see it.
    `again` are cells of tokens that stand in an earlier sequence's cell already: of shared prompts.
    `rotary` are the tokens' cosines and sines [tokens, 1, head_dim], of the queries' dtype.
    """

    rectangles: list[tuple[int, int]] = field(default_factory=list)
    cells: torch.Tensor | None = None
    places: torch.Tensor | None = None
    again: torch.Tensor | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None


def packed_sequences(
    lengths: list[int],
    cu_seqlens: torch.Tensor,
    context_ranks: int = 1,
    layout: torch.Tensor | None = None,
) -> PackedSequences:
    """Describe a pack of whole sequences of these `lengths`; `cu_seqlens` int32 [sequences + 1] are
    their bounds, and `layout` is `PackedBatch`'s.

    Under context parallelism the lengths are multiples of 2 * `context_ranks`, padding at a
    sequence's end included: the tokens before it never see it, so Megatron and Transformer Engine
    may take it for tokens.
    """
    rectangles, cells, real = _rectangles(lengths)
    # the rectangles read from, and write to, the ranks' slices: reordering costs nothing more
    if context_ranks > 1:
        cells = rank_order(lengths, context_ranks)[cells]
    places = torch.empty(sum(lengths), dtype=torch.int64).scatter_(0, cells[real], real)
    # a prompt that several sequences share is attended from in the first, and to in all of them
    again = None
    if layout is not None:
        first = torch.from_numpy(np.unique(layout.numpy(), return_index=True)[1])
        others = torch.ones(len(layout), dtype=torch.bool).index_fill_(0, first, False)
        again = places[others].to(cu_seqlens.device)
        cells, places = layout[cells], places[first]
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        rectangles=rectangles,
        cells=cells.to(cu_seqlens.device),
        places=places.to(cu_seqlens.device),
        again=again,
    )


def _rectangles(lengths: list[int]) -> tuple[list[tuple[int, int]], torch.Tensor, torch.Tensor]:
    """Group a pack's sequences into rectangles that waste little: their shapes, cells, and which
    cells are real.
    """
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and lengths[i] >= _WASTE * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    cells, real = [], []
    for group in groups:
        length = torch.tensor([lengths[i] for i in group])[:, None]
        column = torch.arange(lengths[group[0]])[None]
        cells.append(
            (
                torch.tensor([starts[i] for i in group])[:, None]
                + torch.minimum(column, length - 1)
            ).flatten()
        )
        real.append((column < length).flatten())
    shapes = [(len(group), lengths[group[0]]) for group in groups]
    return shapes, torch.cat(cells), torch.cat(real).nonzero()[:, 0]


class _Pad(torch.autograd.Function):
    """[tokens, ...] to [cells, ...]. No gradient reaches a padding cell, so backward only collects
    the real ones, and adds those of cells that hold a token `again`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        cells: torch.Tensor,
        places: torch.Tensor,
        again: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(places, again, None if again is None else cells[again])
        return x.index_select(0, cells)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        places, again, tokens = ctx.saved_tensors
        collected = grad.index_select(0, places)
        if again is not None:
            wide = collected.to(torch.promote_types(grad.dtype, torch.float32))
            more = grad.index_select(0, again).to(wide.dtype)
            collected = wide.index_add_(0, tokens, more).to(grad.dtype)
        return collected, None, None, None


class PackedAttention(MegatronModule):
    """Causal attention within each sequence of a pack, over torch's scaled_dot_product_attention.

    Takes query `[tokens, heads, head_dim]`, key and value `[tokens, kv groups, head_dim]` of this
    rank, returns `[tokens, heads * head_dim]`. Replaces Megatron's DotProductAttention, which knows
    no packing. Under context parallelism each rank brings its slice of the tokens, trades it for
    whole sequences of some of the heads (Jacobs et al. 2023, DeepSpeed-Ulysses), and trades the
    result back.
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
            raise ValueError(
                "PackedAttention works on packed sequences; packed_seq_params is missing"
            )
        pack = packed_seq_params
        assert pack.cells is not None
        assert pack.places is not None
        # rotate (Megatron's own slices the pack by sequence, in every layer), and with context
        # parallelism trade tokens for heads
        if pack.rotary is not None:
            query, key = (rotated(x, *pack.rotary) for x in (query, key))
        if self.context is not None:
            query, key, value = tokens_for_heads(query, key, value, self.context)
        # pad sequences of similar length to rectangles: few calls, little padding
        repeat = query.shape[1] // key.shape[1]
        padded = [_Pad.apply(x, pack.cells, pack.places, pack.again) for x in (query, key, value)]
        sizes = [n * longest for n, longest in pack.rectangles]
        # causal attention, a rectangle at a time
        outputs = []
        for shape, *parts in zip(pack.rectangles, *(x.split(sizes) for x in padded), strict=True):
            # [n, heads, longest, head_dim]
            q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in parts)
            if repeat > 1:
                k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
            attended = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
        # back to packed order, and to this rank's tokens
        attended = torch.cat(outputs).index_select(0, pack.places)
        return (
            attended if self.context is None else heads_for_tokens(attended, self.context)
        ).flatten(1)


def local_layers(config: TransformerConfig, stage_layers: int) -> TransformerBlockSubmodules:
    """A stage's layers from Megatron's local parts, with attention and norms of our own."""
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
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
