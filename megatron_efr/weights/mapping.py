"""The one mapping between Hugging Face tensors and Megatron parameters, as a table, in both
directions.

A Megatron parameter is named as in the whole model (`decoder.layers.<layer>....`, experts by their
number in it), whatever rank holds it. A row of the table says which Hugging Face tensors make it up
and how it is cut over tensor-parallel ranks (`cuts`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import torch

from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.divisibility import check_split
from megatron_efr.weights.tensor_parallel_split import (
    PLACES,
    TO_HUGGING_FACE,
    TO_MEGATRON,
    Cut,
    Pairs,
    Split,
    padded_vocab,
)


@dataclass(frozen=True, slots=True)
class MappingRow:
    """One line of the table: `{n}` stands for the layer, `{e}` for the expert."""

    megatron: str
    hugging_face: tuple[str, ...]
    split: Split
    # another name of the same parameter: Transformer Engine's, if it differs
    alias: str | None = None

    def at(self, n: int, e: int = 0) -> MappingRow:
        """The row of layer `n` (and expert `e`)."""
        return MappingRow(
            self.megatron.format(n=n, e=e),
            tuple(name.format(n=n, e=e) for name in self.hugging_face),
            self.split,
            None if self.alias is None else self.alias.format(n=n, e=e),
        )


_L = "decoder.layers.{n}."
_H = "model.layers.{n}."
_EMBEDDING = MappingRow("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab")
_HEAD = MappingRow("output_layer.weight", ("lm_head.weight",), "vocab")
_FINAL_NORM = MappingRow("decoder.final_layernorm.weight", ("model.norm.weight",), "whole")
_QKV = tuple(_H + f"self_attn.{x}_proj" for x in "qkv")
_INPUT_NORM = MappingRow(
    _L + "input_layernorm.weight",
    (_H + "input_layernorm.weight",),
    "whole",
    alias=_L + "self_attention.linear_qkv.layer_norm_weight",
)
_QKV_WEIGHT = MappingRow(
    _L + "self_attention.linear_qkv.weight", tuple(f"{name}.weight" for name in _QKV), "qkv"
)
_QKV_BIAS = MappingRow(
    _L + "self_attention.linear_qkv.bias", tuple(f"{name}.bias" for name in _QKV), "qkv"
)
_QK_NORMS = tuple(
    MappingRow(
        _L + f"self_attention.{x}_layernorm.weight", (_H + f"self_attn.{x}_norm.weight",), "whole"
    )
    for x in "qk"
)
_PROJECTION = MappingRow(
    _L + "self_attention.linear_proj.weight", (_H + "self_attn.o_proj.weight",), "row"
)
_MLP_NORM = MappingRow(
    _L + "pre_mlp_layernorm.weight",
    (_H + "post_attention_layernorm.weight",),
    "whole",
    alias=_L + "mlp.linear_fc1.layer_norm_weight",
)
_MLP = (
    MappingRow(
        _L + "mlp.linear_fc1.weight",
        (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight"),
        "gate_up",
    ),
    MappingRow(_L + "mlp.linear_fc2.weight", (_H + "mlp.down_proj.weight",), "row"),
)
_ROUTER = MappingRow(_L + "mlp.router.weight", (_H + "mlp.gate.weight",), "whole")
_EXPERT = _L + "mlp.experts.local_experts.{e}."
_HF_EXPERT = _H + "mlp.experts.{e}."
_EXPERTS = (
    MappingRow(
        _EXPERT + "linear_fc1.weight",
        (_HF_EXPERT + "gate_proj.weight", _HF_EXPERT + "up_proj.weight"),
        "gate_up",
    ),
    MappingRow(_EXPERT + "linear_fc2.weight", (_HF_EXPERT + "down_proj.weight",), "row"),
)
# A rank's experts by their modules' names: SequentialMLP's, TEGroupedMLP's, GroupedMLP's.
_SEQUENTIAL = re.compile(r"(.*\.mlp\.experts\.)local_experts\.(\d+)\.(linear_fc[12])\.weight")
_TE_GROUPED = re.compile(r"(.*\.mlp\.experts\.)(linear_fc[12])\.weight(\d+)")
_GROUPED = re.compile(r"(.*\.mlp\.experts\.)(weight[12])")


class WeightMapping:
    """Translates tensors of one architecture, given how many tensor-parallel ranks split it."""

    def __init__(
        self,
        architecture: Architecture,
        tensor_ranks: int = 1,
        *,
        expert_ranks: int = 1,
        expert_rank: int = 0,
        grouped: bool = False,
    ) -> None:
        """`expert_rank` of `expert_ranks` is whose module names `canonical` takes; `grouped`:
        experts are a GroupedMLP.

        ConfigError if the model does not divide over the ranks.
        """
        self.architecture = architecture
        self.tensor_ranks = tensor_ranks
        self.expert_ranks = expert_ranks
        self._expert_rank, self._grouped = expert_rank, grouped
        check_split(architecture, tensor_ranks, expert_ranks)
        self._rows: dict[str, MappingRow] = {}  # by Megatron name and by alias, layer filled in
        for row in self._table():
            self._rows[row.megatron] = row
            if row.alias is not None:
                self._rows[row.alias] = row

    def _table(self) -> Iterator[MappingRow]:
        a = self.architecture
        layer = [_INPUT_NORM, _QKV_WEIGHT]
        layer += [_QKV_BIAS] if a.qkv_bias else []
        layer += [*_QK_NORMS] if a.qk_norm else []
        layer += [_PROJECTION, _MLP_NORM]
        layer += [_ROUTER] if a.experts else [*_MLP]
        # tied models hold the embedding a second time, as the head of the last pipeline stage
        yield replace(_EMBEDDING, alias=_HEAD.megatron) if a.tied else _EMBEDDING
        for n in range(a.layers):
            yield from (row.at(n) for row in layer)
            yield from self._grouped_experts(n) if self._grouped else self._single_experts(n)
        yield _FINAL_NORM
        if not a.tied:
            yield _HEAD

    def _single_experts(self, n: int) -> Iterator[MappingRow]:
        for e in range(self.architecture.experts.count if self.architecture.experts else 0):
            yield from (row.at(n, e) for row in _EXPERTS)

    def _grouped_experts(self, n: int) -> Iterator[MappingRow]:
        """GroupedMLP's two tensors of every expert-parallel rank, named by the first and last of
        its experts.
        """
        splits: tuple[Split, Split] = ("grouped_gate_up", "grouped_row")
        for first in range(0, self._per_rank * self.expert_ranks, self._per_rank):
            experts = range(first, first + self._per_rank)
            for row, tensor, split in zip(_EXPERTS, ("weight1", "weight2"), splits, strict=True):
                sources = tuple(source for e in experts for source in row.at(n, e).hugging_face)
                yield MappingRow(
                    f"{_L.format(n=n)}mlp.experts.{first}-{experts[-1]}.{tensor}", sources, split
                )

    @property
    def _per_rank(self) -> int:
        """Experts on each expert-parallel rank."""
        return (
            self.architecture.experts.count if self.architecture.experts else 0
        ) // self.expert_ranks

    @property
    def _cut(self) -> Cut:
        return Cut(self.architecture, self.tensor_ranks, self._per_rank)

    @property
    def padded_vocab(self) -> int:
        """Rows of Megatron's embedding: the true vocabulary rounded up to 8 rows on every rank."""
        return padded_vocab(self.architecture.vocab, self.tensor_ranks)

    def parameters(self) -> list[str]:
        """Every Megatron parameter of the whole model, in the order in which weights are sent."""
        return [row.megatron for row in self._table()]

    def canonical(self, name: str) -> str:
        """The table's name of a parameter of this rank's modules: experts by their number in the
        whole model, and Transformer Engine's names turned into the local ones. KeyError if it is
        unknown.
        """
        first = self._expert_rank * self._per_rank
        if match := _SEQUENTIAL.fullmatch(name):
            path, expert, linear = match.groups()
            name = f"{path}local_experts.{first + int(expert)}.{linear}.weight"
        elif match := _TE_GROUPED.fullmatch(name):
            path, linear, expert = match.groups()
            name = f"{path}local_experts.{first + int(expert)}.{linear}.weight"
        elif match := _GROUPED.fullmatch(name):
            name = f"{match[1]}{first}-{first + self._per_rank - 1}.{match[2]}"
        return self._row(name).megatron

    def expert_rank(self, name: str) -> int | None:
        """The expert-parallel rank that holds parameter `name`; None if it is not an expert's."""
        match = re.search(r"\.mlp\.experts\.(?:local_experts\.)?(\d+)", name)
        return None if match is None else int(match[1]) // self._per_rank

    def sources(self, name: str) -> tuple[str, ...]:
        """The Hugging Face tensors that make up Megatron parameter `name`."""
        return self._row(name).hugging_face

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every Hugging Face tensor of the model and its shape."""
        return dict(self._shapes)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        # widths of heads, and of the feed-forward layers or each expert's
        a = self.architecture
        q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
        ffn = a.experts.ffn if a.experts else a.ffn
        # the first suffix that fits counts: q_norm and k_norm stand before norm
        by_suffix: dict[str, tuple[int, ...]] = {
            "embed_tokens.weight": (a.vocab, a.hidden),
            "lm_head.weight": (a.vocab, a.hidden),
            "q_norm.weight": (a.head_dim,),
            "k_norm.weight": (a.head_dim,),
            "norm.weight": (a.hidden,),
            "mlp.gate.weight": (a.experts.count if a.experts else 0, a.hidden),
            "q_proj.weight": (q, a.hidden),
            "k_proj.weight": (kv, a.hidden),
            "v_proj.weight": (kv, a.hidden),
            "q_proj.bias": (q,),
            "k_proj.bias": (kv,),
            "v_proj.bias": (kv,),
            "o_proj.weight": (a.hidden, q),
            "gate_proj.weight": (ffn, a.hidden),
            "up_proj.weight": (ffn, a.hidden),
            "down_proj.weight": (a.hidden, ffn),
        }
        # experts and layers repeat the same suffixes
        names = [name for row in self._table() for name in row.hugging_face]
        return {
            name: next(s for suffix, s in by_suffix.items() if name.endswith(suffix))
            for name in names
        }

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole shape of Megatron parameter `name`, over all tensor-parallel ranks; not of
        grouped experts.
        """
        row = self._row(name)
        shapes = self._shapes
        rows = (
            self.padded_vocab
            if row.split == "vocab"
            else sum(shapes[source][0] for source in row.hugging_face)
        )
        return (rows, *shapes[row.hugging_face[0]][1:])

    def split(self, name: str) -> Split:
        """The row of the table that says how parameter `name` is made up and split."""
        return self._row(name).split

    def to_megatron(
        self, name: str, tensors: Mapping[str, torch.Tensor], rank: int
    ) -> torch.Tensor:
        """Shard of parameter `name` for tensor-parallel rank `rank`, from whole tensors."""
        row = self._row(name)
        parts = [tensors[source] for source in row.hugging_face]
        return TO_MEGATRON[row.split](self._cut, parts, rank)

    def to_hugging_face(
        self, name: str, shards: list[torch.Tensor]
    ) -> list[tuple[str, torch.Tensor]]:
        """Whole Hugging Face tensors of parameter `name`, from every rank's shard in order; views
        if possible.
        """
        row = self._row(name)
        return list(
            zip(row.hugging_face, TO_HUGGING_FACE[row.split](self._cut, shards), strict=True)
        )

    def places(
        self, name: str, shard: torch.Tensor, rank: int, out: list[torch.Tensor]
    ) -> Pairs | None:
        """The parts of tensor-parallel rank `rank`'s shard, as views, each beside its place in
        whole tensors `out`.

        None if a rank's shard alone does not say: several experts in one, or KV groups split over
        ranks.
        """
        split = self._row(name).split
        if split not in PLACES or (
            split == "qkv" and self.architecture.kv_heads % self.tensor_ranks
        ):
            return None
        return PLACES[split](self._cut, shard, rank, out)

    def fill(self, name: str, shards: list[torch.Tensor], out: list[torch.Tensor]) -> None:
        """Like `to_hugging_face`, into contiguous tensors that are there; most splits are copied
        once.
        """
        each = [self.places(name, shard, rank, out) for rank, shard in enumerate(shards)]
        if None in each:
            whole = [tensor for _, tensor in self.to_hugging_face(name, shards)]
            each = [list(zip(whole, out, strict=True))]
        for part, place in chain.from_iterable(filter(None, each)):
            place.copy_(part)

    def is_sharded(self, name: str) -> bool:
        """True if tensor-parallel ranks hold different parts of parameter `name`."""
        return self._row(name).split != "whole"

    def _row(self, name: str) -> MappingRow:
        try:
            return self._rows[name]
        except KeyError:
            raise KeyError(
                f"{name}: no such parameter in a {self.architecture.model_type} model"
            ) from None
