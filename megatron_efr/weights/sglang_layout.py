"""SGLang's own parameters: their names, and each engine rank's slice of them, from whole Hugging Face tensors.

SGLang fuses what it multiplies together and splits it over its tensor-parallel ranks (0.5.23, dense models):

    qkv_proj        rows of q, k and v, each split over ranks; with fewer KV heads than ranks, ranks share heads
    gate_up_proj    rows of gate and up, each split
    o_proj, down_proj               columns
    embed_tokens, lm_head           rows, zeros added up to a multiple of 64 on all ranks together
    norms, a router                 the same on every rank

A mixture's experts are fused over a whole layer; they are not in this table.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence

import torch

from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.publish import WeightMismatchError
from megatron_efr.weights.reshard import Parcel

_FUSED = re.compile(r"(.*\.)(q|k|v|gate|up)_proj\.(weight|bias)")
_VOCABULARY_MULTIPLE = 64


class EngineLayout:
    """How engines of `ranks` tensor-parallel ranks hold a model."""

    def __init__(self, architecture: Architecture, ranks: int) -> None:
        self.architecture, self.ranks = architecture, ranks

    @property
    def padded_on_cpu(self) -> bool:
        """Whether engines on a CPU hold a wider model than this table says: they add heads, and MLP columns in runs of
        32 a rank, until all ranks have as many (`adjust_config_with_unaligned_cpu_tp`)."""
        a = self.architecture
        return a.kv_heads % self.ranks > 0 or a.heads % self.ranks > 0 or a.ffn % (32 * self.ranks) > 0

    def slices(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """(SGLang's name, the slice of every rank) of whole tensors; what is fused must be given together."""
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors:
            if ".experts." in name:
                continue
            match = _FUSED.fullmatch(name)
            fused = "qkv" if match and match[2] in "qkv" else "gate_up"
            target = f"{match[1]}{fused}_proj.{match[3]}" if match else name
            parts.setdefault(target, {})[match[2] if match else ""] = tensor
        for target, found in parts.items():
            yield target, [self._slice(target, found, rank) for rank in range(self.ranks)]

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
        self._expected: dict[str, str] = {}

    def add(self, parcel: Parcel) -> None:
        """Take note of tensors that were sent."""
        if not self._exact:  # names are all that counts: nothing is laid together
            parcel = parcel._replace(tensors=[(name, tensor.to("meta")) for name, tensor in parcel.tensors])
        for name, slices in self._layout.slices(parcel.tensors):
            for rank, tensor in enumerate(slices):
                key = name if self._layout.ranks == 1 else f"rank{rank}.{name}"
                self._expected[key] = checksum(tensor.to(self._dtype)) if self._exact else ""

    def compare(self, servers: list[dict[str, str]]) -> None:
        """WeightMismatchError names the first parameter that a server does not have as it was sent."""
        for number, found in enumerate(servers):
            dense = {name: value for name, value in found.items() if ".experts." not in name}
            if unknown := sorted(self._expected.keys() - dense.keys()):
                raise WeightMismatchError(f"server {number}: was sent {unknown[0]}, which it does not have")
            if unsent := sorted(dense.keys() - self._expected.keys()):
                raise WeightMismatchError(f"server {number}: has {unsent[0]}, which was never sent")
            for name in self._expected if self._exact else ():
                if found[name] != self._expected[name]:
                    raise WeightMismatchError(f"server {number}: {name} is not what was sent: {found[name]}")
            for name, value in servers[0].items():
                if found.get(name) != value:
                    raise WeightMismatchError(f"server {number}: {name} differs from server 0's")


def checksum(tensor: torch.Tensor) -> str:
    """SGLang's checksum of a parameter in host memory."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).digest()[:8].hex()
