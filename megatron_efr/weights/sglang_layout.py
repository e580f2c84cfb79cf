"""SGLang's own parameters: their names, and each engine rank's slice of them, from whole Hugging Face tensors.

SGLang fuses what it multiplies together and splits it over its tensor-parallel ranks (0.5.23):

    qkv_proj        rows of q, k and v, each split over ranks; with fewer KV heads than ranks, ranks share heads
    gate_up_proj    rows of gate and up, each split
    o_proj, down_proj               columns
    embed_tokens, lm_head           rows, zeros added up to a multiple of 64 on all ranks together
    norms, a router                 the same on every rank
    experts.w13_weight              of each expert in turn, gate and up as above: [experts, 2 * ffn, hidden]
    experts.w2_weight               the same of down: [experts, hidden, ffn]
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.publish import WeightMismatchError
from megatron_efr.weights.reshard import Parcel

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
    """How engines of `ranks` tensor-parallel ranks hold a model."""

    def __init__(self, architecture: Architecture, ranks: int) -> None:
        self.architecture, self.ranks = architecture, ranks

    @property
    def padded_on_cpu(self) -> bool:
        """Whether engines on a CPU hold a wider model than this table says: they add heads, and MLP columns in runs of
        32 a rank, until all ranks have as many (`adjust_config_with_unaligned_cpu_tp`). The columns that they add to
        experts are in this table."""
        a = self.architecture
        widened = a.experts is None and a.ffn % (_CPU_MULTIPLE * self.ranks) > 0
        return a.kv_heads % self.ranks > 0 or a.heads % self.ranks > 0 or widened

    def slices(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """(SGLang's name, the slice of every rank) of whole tensors; what is fused must be given together. Experts,
        which are fused over more than fits a bucket, are left out: `expert_part`."""
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
        """Where an expert's matrix lies in SGLang's parameter on a CPU, with its zeros; None where it is not one."""
        experts, match = self.architecture.experts, self._expert(name)
        if experts is None or match is None:
            return None
        number, down = int(match[2]), match[3] == "down"
        missing = -experts.ffn % (_CPU_MULTIPLE * self.ranks)
        wide = torch.nn.functional.pad(tensor, (0, missing) if down else (0, 0, 0, missing)) if missing else tensor
        slices = list(wide.chunk(self.ranks, dim=1 if down else 0))
        if down:
            return ExpertPart(f"{match[1]}w2_weight", number, experts.count, slices)
        return ExpertPart(f"{match[1]}w13_weight", 2 * number + (match[3] == "up"), 2 * experts.count, slices)

    def _expert(self, name: str) -> re.Match[str] | None:
        experts, match = self.architecture.experts, _EXPERT.fullmatch(name)
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
        return torch.cat([mine, mine.new_zeros(rows - len(mine), *whole.shape[1:])]) if len(mine) < rows else mine


class ChecksumCheck:
    """The checksums that engines on a CPU must report: the first 8 bytes of SHA-256 over a parameter's bytes.

    Where engines hash otherwise (`exact` false: on CUDA), names are held to the table, and engines to each other.
    """

    def __init__(self, layout: EngineLayout, dtype: torch.dtype, *, exact: bool) -> None:
        self._layout, self._dtype, self._exact = layout, dtype, exact
        self._expected: dict[str, _Sum] = {}

    def add(self, parcel: Parcel) -> None:
        """Take note of tensors that were sent."""
        if not self._exact:  # names are all that counts: nothing is laid together
            parcel = parcel._replace(tensors=[(name, tensor.to("meta")) for name, tensor in parcel.tensors])
        for name, tensor in parcel.tensors:
            if (part := self._layout.expert_part(name, tensor)) is not None:
                self._expect(*part)
        for name, slices in self._layout.slices(parcel.tensors):
            self._expect(name, 0, 1, slices)

    def _expect(self, name: str, place: int, places: int, slices: list[torch.Tensor]) -> None:
        for rank, tensor in enumerate(slices):
            key = name if self._layout.ranks == 1 else f"rank{rank}.{name}"
            found = self._expected.setdefault(key, _Sum(places))
            found.add(place, tensor.to(self._dtype) if self._exact else None)

    def compare(self, servers: list[dict[str, str]]) -> None:
        """WeightMismatchError names the first parameter that a server does not have as it was sent."""
        for name, expected in self._expected.items():
            if expected.missing:
                raise WeightMismatchError(f"{name}: part {expected.missing[0]} of {expected.places} was never sent")
        for number, found in enumerate(servers):
            if unknown := sorted(self._expected.keys() - found.keys()):
                raise WeightMismatchError(f"server {number}: was sent {unknown[0]}, which it does not have")
            if unsent := sorted(found.keys() - self._expected.keys()):
                raise WeightMismatchError(f"server {number}: has {unsent[0]}, which was never sent")
            for name, expected in self._expected.items() if self._exact else ():
                if found[name] != expected.checksum:
                    raise WeightMismatchError(f"server {number}: {name} is not what was sent: {found[name]}")
            for name, value in servers[0].items():
                if found.get(name) != value:
                    raise WeightMismatchError(f"server {number}: {name} differs from server 0's")


class _Sum:
    """SGLang's checksum of a parameter in host memory, whose `places` parts may come in any order."""

    def __init__(self, places: int) -> None:
        self.places = places
        self._sha, self._hashed = hashlib.sha256(), 0
        self._came: set[int] = set()
        self._early: dict[int, torch.Tensor] = {}

    @property
    def missing(self) -> list[int]:
        """The parts that have not come."""
        return [place for place in range(self.places) if place not in self._came]

    @property
    def checksum(self) -> str:
        return self._sha.digest()[:8].hex()

    def add(self, place: int, part: torch.Tensor | None) -> None:
        """Take note of a part; None where nobody will ask for the checksum."""
        self._came.add(place)
        if part is None:
            return
        self._early[place] = part if place == self._hashed else part.clone()  # its memory will be another bucket's
        while (following := self._early.pop(self._hashed, None)) is not None:
            raw = following.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            self._sha.update(raw.numpy().data)
            self._hashed += 1
