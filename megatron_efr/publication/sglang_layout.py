"""SGLang's own parameters: their names, and each engine rank's slice of them, from whole Hugging
Face tensors.

SGLang fuses what it multiplies together and splits it over its tensor-parallel ranks (0.5.23):

    qkv_proj        rows of q, k and v, each split over ranks; with fewer KV heads than ranks,
        ranks share heads
    gate_up_proj    rows of gate and up, each split
    o_proj, down_proj               columns
    embed_tokens, lm_head           rows, zeros added up to a multiple of 64 on all ranks together
    norms, a router                 the same on every rank
    experts.w13_weight
        of each expert in turn, gate and up as above: [experts, 2 * ffn, hidden]
    experts.w2_weight               the same of down: [experts, hidden, ffn]
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from megatron_efr.weights.architecture import Architecture

_FUSED = re.compile(r"(.*\.)(q|k|v|gate|up)_proj\.(weight|bias)")
_EXPERT = re.compile(r"(.*\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")
_VOCABULARY_MULTIPLE = 64
_CPU_MULTIPLE = 32


class ExpertPart(NamedTuple):
    """One matrix of one expert in the parameter that has all of a layer's."""

    target: str
    place: int  # among the parameter's parts, which lie one after another
    places: int
    slices: list[torch.Tensor]  # of every rank


class EngineLayout:
    """Layout of a model on engines of `ranks` tensor-parallel ranks."""

    def __init__(self, architecture: Architecture, ranks: int) -> None:
        self.architecture, self.ranks = architecture, ranks

    @property
    def padded_on_cpu(self) -> bool:
        """True if engines on a CPU hold a wider model than this table says: they add heads, and MLP
        columns in runs of 32 a rank, until all ranks have as many
        (`adjust_config_with_unaligned_cpu_tp`). The columns that they add to experts are in this
        table.
        """
        a = self.architecture
        widened = a.experts is None and a.ffn % (_CPU_MULTIPLE * self.ranks) > 0
        return a.kv_heads % self.ranks > 0 or a.heads % self.ranks > 0 or widened

    def slices(
        self, tensors: Sequence[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """(SGLang's name, the slice of every rank) of whole tensors; what is fused must be given
        together. Experts, which are fused over more than fits a bucket, are left out:
        `expert_part`.
        """
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors:
            if self._expert(name):
                continue
            match = _FUSED.fullmatch(name) if ".experts." not in name else None
            fused = "qkv" if match and match[2] in "qkv" else "gate_up"
            target = f"{match[1]}{fused}_proj.{match[3]}" if match else name
            parts.setdefault(target, {})[match[2] if match else ""] = tensor
        for target, found in parts.items():
            yield target, [self._slice(target, found, rank) for rank in range(self.ranks)]

    def expert_part(self, name: str, tensor: torch.Tensor) -> ExpertPart | None:
        """The place of an expert's matrix in SGLang's parameter on a CPU, with its zeros; None if
        it is not one.
        """
        experts = self.architecture.experts
        match = self._expert(name)
        if experts is None or match is None:
            return None
        number = int(match[2])
        down = match[3] == "down"
        missing = -experts.ffn % (_CPU_MULTIPLE * self.ranks)
        wide = (
            torch.nn.functional.pad(tensor, (0, missing) if down else (0, 0, 0, missing))
            if missing
            else tensor
        )
        slices = list(wide.chunk(self.ranks, dim=1 if down else 0))
        if down:
            return ExpertPart(f"{match[1]}w2_weight", number, experts.count, slices)
        return ExpertPart(
            f"{match[1]}w13_weight", 2 * number + (match[3] == "up"), 2 * experts.count, slices
        )

    def _expert(self, name: str) -> re.Match[str] | None:
        experts = self.architecture.experts
        match = _EXPERT.fullmatch(name)
        return match if experts and match and int(match[2]) < experts.count else None

    def _slice(self, target: str, parts: dict[str, torch.Tensor], rank: int) -> torch.Tensor:
        if ".qkv_proj." in target:
            key_value = [self._heads(parts[x], rank) for x in "kv"]
            return torch.cat([parts["q"].chunk(self.ranks)[rank], *key_value])
        if ".gate_up_proj." in target:
            return torch.cat([parts[x].chunk(self.ranks)[rank] for x in ("gate", "up")])
        (whole,) = parts.values()
        if target.endswith(("o_proj.weight", "down_proj.weight")):
            return whole.chunk(self.ranks, dim=1)[rank]
        if target.endswith(("embed_tokens.weight", "lm_head.weight")):
            return self._vocabulary(whole, rank)
        return whole

    def _heads(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        """A rank's keys or values."""
        heads = self.architecture.kv_heads
        if heads >= self.ranks:
            return whole.chunk(self.ranks)[rank]
        return whole.chunk(heads)[rank * heads // self.ranks]

    def _vocabulary(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        multiple = _VOCABULARY_MULTIPLE
        if -(-len(whole) // multiple) * multiple % self.ranks:
            multiple *= self.ranks
        rows = -(-len(whole) // multiple) * multiple // self.ranks
        mine = whole[rank * rows : (rank + 1) * rows]
        return (
            torch.cat([mine, mine.new_zeros(rows - len(mine), *whole.shape[1:])])
            if len(mine) < rows
            else mine
        )
