"""The one mapping between Hugging Face tensors and Megatron parameters, as a table, in both directions.

A Megatron parameter is named as in the whole model (`decoder.layers.<global index>....`), whatever stage holds it. A
row of the table says which Hugging Face tensors make it up and how it is split over tensor-parallel ranks:

    whole   the same on every rank                  column  split by rows (dim 0)
    row     split by columns (dim 1)                vocab   rows, padded to divide over the ranks
    qkv     per KV group [q.., k, v], then dim 0    gate_up [gate; up], each half split by rows
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from megatron_efr.weights.architecture import Architecture

Split = Literal["whole", "column", "row", "vocab", "qkv", "gate_up"]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: `{n}` stands for the layer."""

    megatron: str
    hugging_face: tuple[str, ...]
    split: Split
    alias: str | None = None  # another name of the same parameter: Transformer Engine's, where it differs


_L = "decoder.layers.{n}."
_H = "model.layers.{n}."
_EMBEDDING = Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab")
_HEAD = Row("output_layer.weight", ("lm_head.weight",), "vocab")
_FINAL_NORM = Row("decoder.final_layernorm.weight", ("model.norm.weight",), "whole")
_QKV = tuple(_H + f"self_attn.{x}_proj" for x in "qkv")
_LAYER = (
    Row(
        _L + "input_layernorm.weight",
        (_H + "input_layernorm.weight",),
        "whole",
        alias=_L + "self_attention.linear_qkv.layer_norm_weight",
    ),
    Row(_L + "self_attention.linear_qkv.weight", tuple(f"{name}.weight" for name in _QKV), "qkv"),
    Row(_L + "self_attention.linear_proj.weight", (_H + "self_attn.o_proj.weight",), "row"),
    Row(
        _L + "pre_mlp_layernorm.weight",
        (_H + "post_attention_layernorm.weight",),
        "whole",
        alias=_L + "mlp.linear_fc1.layer_norm_weight",
    ),
    Row(_L + "mlp.linear_fc1.weight", (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight"), "gate_up"),
    Row(_L + "mlp.linear_fc2.weight", (_H + "mlp.down_proj.weight",), "row"),
)
_QKV_BIAS = Row(_L + "self_attention.linear_qkv.bias", tuple(f"{name}.bias" for name in _QKV), "qkv")


class WeightMapping:
    """Translates tensors of one architecture, given how many tensor-parallel ranks split it."""

    def __init__(self, architecture: Architecture, tensor_ranks: int = 1) -> None:
        self.architecture = architecture
        self.tensor_ranks = tensor_ranks
        self._rows: dict[str, Row] = {}  # by Megatron name and by alias, layer filled in
        for row in self._table():
            self._rows[row.megatron] = row
            if row.alias is not None:
                self._rows[row.alias] = row

    def _table(self) -> Iterator[Row]:
        # tied models hold the embedding a second time, as the head of the last pipeline stage
        yield replace(_EMBEDDING, alias=_HEAD.megatron) if self.architecture.tied else _EMBEDDING
        for n in range(self.architecture.layers):
            for row in _LAYER + ((_QKV_BIAS,) if self.architecture.qkv_bias else ()):
                yield Row(
                    row.megatron.format(n=n),
                    tuple(name.format(n=n) for name in row.hugging_face),
                    row.split,
                    None if row.alias is None else row.alias.format(n=n),
                )
        yield _FINAL_NORM
        if not self.architecture.tied:
            yield _HEAD

    @property
    def padded_vocab(self) -> int:
        """Rows of Megatron's embedding: the true vocabulary rounded up to 8 rows on every rank."""
        return padded_vocab(self.architecture.vocab, self.tensor_ranks)

    def parameters(self) -> list[str]:
        """Every Megatron parameter of the whole model, in the order in which weights are sent."""
        return [row.megatron for row in self._table()]

    def canonical(self, name: str) -> str:
        """The table's name of a parameter that may carry Transformer Engine's; KeyError if it is unknown."""
        return self._row(name).megatron

    def sources(self, name: str) -> tuple[str, ...]:
        """The Hugging Face tensors that make up Megatron parameter `name`."""
        return self._row(name).hugging_face

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every Hugging Face tensor of the model and its shape."""
        a = self.architecture
        q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
        by_suffix: dict[str, tuple[int, ...]] = {
            "embed_tokens.weight": (a.vocab, a.hidden),
            "lm_head.weight": (a.vocab, a.hidden),
            "norm.weight": (a.hidden,),
            "layernorm.weight": (a.hidden,),
            "q_proj.weight": (q, a.hidden),
            "k_proj.weight": (kv, a.hidden),
            "v_proj.weight": (kv, a.hidden),
            "q_proj.bias": (q,),
            "k_proj.bias": (kv,),
            "v_proj.bias": (kv,),
            "o_proj.weight": (a.hidden, q),
            "gate_proj.weight": (a.ffn, a.hidden),
            "up_proj.weight": (a.ffn, a.hidden),
            "down_proj.weight": (a.hidden, a.ffn),
        }
        names = [name for row in self._table() for name in row.hugging_face]
        return {name: next(s for suffix, s in by_suffix.items() if name.endswith(suffix)) for name in names}

    def to_megatron(self, name: str, tensors: Mapping[str, torch.Tensor], rank: int) -> torch.Tensor:
        """Tensor-parallel rank `rank`'s shard of parameter `name`, from whole Hugging Face tensors."""
        row = self._row(name)
        parts = [tensors[source] for source in row.hugging_face]
        return _TO_MEGATRON[row.split](self, parts, rank)

    def to_hugging_face(self, name: str, shards: list[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        """Whole Hugging Face tensors of parameter `name`, from every rank's shard in order; views where possible."""
        row = self._row(name)
        return list(zip(row.hugging_face, _TO_HUGGING_FACE[row.split](self, shards), strict=True))

    def is_sharded(self, name: str) -> bool:
        """Whether tensor-parallel ranks hold different parts of parameter `name`."""
        return self._row(name).split != "whole"

    def _row(self, name: str) -> Row:
        try:
            return self._rows[name]
        except KeyError:
            raise KeyError(f"{name}: no such parameter in a {self.architecture.model_type} model") from None

    def _group(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """q, k, v to [kv groups, rows of one group, ...]."""
        groups = self.architecture.kv_heads
        return torch.cat([part.reshape(groups, -1, *part.shape[1:]) for part in parts], dim=1)


def padded_vocab(vocab: int, tensor_ranks: int) -> int:
    """`vocab` rounded up so that every tensor-parallel rank holds the same multiple of 8 rows."""
    multiple = 8 * tensor_ranks
    return -(-vocab // multiple) * multiple


def _slice(tensor: torch.Tensor, dim: int, rank: int, ranks: int) -> torch.Tensor:
    return tensor.chunk(ranks, dim=dim)[rank]


def _qkv_to_megatron(mapping: WeightMapping, parts: list[torch.Tensor], rank: int) -> torch.Tensor:
    return _slice(mapping._group(parts).flatten(0, 1), 0, rank, mapping.tensor_ranks)


def _gate_up_to_megatron(mapping: WeightMapping, parts: list[torch.Tensor], rank: int) -> torch.Tensor:
    return torch.cat([_slice(part, 0, rank, mapping.tensor_ranks) for part in parts])


def _vocab_to_megatron(mapping: WeightMapping, parts: list[torch.Tensor], rank: int) -> torch.Tensor:
    (whole,) = parts
    missing = mapping.padded_vocab - whole.shape[0]
    padded = torch.cat([whole, whole.new_zeros(missing, whole.shape[1])]) if missing else whole
    return _slice(padded, 0, rank, mapping.tensor_ranks)


def _qkv_to_hugging_face(mapping: WeightMapping, shards: list[torch.Tensor]) -> list[torch.Tensor]:
    a = mapping.architecture
    whole = shards[0] if len(shards) == 1 else torch.cat(shards)
    grouped = whole.reshape(a.kv_heads, -1, *whole.shape[1:])
    sizes = [a.heads // a.kv_heads * a.head_dim, a.head_dim, a.head_dim]
    return [part.flatten(0, 1) for part in grouped.split(sizes, dim=1)]


def _gate_up_to_hugging_face(mapping: WeightMapping, shards: list[torch.Tensor]) -> list[torch.Tensor]:
    halves = [shard.chunk(2) for shard in shards]
    if len(halves) == 1:
        return list(halves[0])
    return [torch.cat([half[i] for half in halves]) for i in range(2)]


def _cat(dim: int) -> Callable[[WeightMapping, list[torch.Tensor]], list[torch.Tensor]]:
    return lambda mapping, shards: [shards[0] if len(shards) == 1 else torch.cat(shards, dim=dim)]


_TO_MEGATRON: dict[Split, Callable[[WeightMapping, list[torch.Tensor], int], torch.Tensor]] = {
    "whole": lambda mapping, parts, rank: parts[0],
    "column": lambda mapping, parts, rank: _slice(parts[0], 0, rank, mapping.tensor_ranks),
    "row": lambda mapping, parts, rank: _slice(parts[0], 1, rank, mapping.tensor_ranks),
    "vocab": _vocab_to_megatron,
    "qkv": _qkv_to_megatron,
    "gate_up": _gate_up_to_megatron,
}

_TO_HUGGING_FACE: dict[Split, Callable[[WeightMapping, list[torch.Tensor]], list[torch.Tensor]]] = {
    "whole": lambda mapping, shards: [shards[0]],
    "column": _cat(0),
    "row": _cat(1),
    "vocab": lambda mapping, shards: [_cat(0)(mapping, shards)[0][: mapping.architecture.vocab]],
    "qkv": _qkv_to_hugging_face,
    "gate_up": _gate_up_to_hugging_face,
}
