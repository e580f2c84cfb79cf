"""Holds what engines say of their weights to what they were sent: SGLang's checksums of it,
computed here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal

import torch

from megatron_efr.errors import WeightMismatchError
from megatron_efr.publication.reshard import Parcel
from megatron_efr.publication.sglang_layout import EngineLayout

Hashing = Literal["sha256", "fmix32"]
"""Engines' hashes: SHA-256 on a CPU, a sum of mixed words on a GPU (`fmix32`)."""


class ChecksumCheck:
    """Takes note of what is sent, and compares it with the checksums that engines report, parameter
    by parameter.

    Without `hashing` (engines hold something else than `layout` says) names are held to the table,
    and engines to each other; so are a mixture's experts on a GPU.
    """

    def __init__(self, layout: EngineLayout, dtype: torch.dtype, hashing: Hashing | None) -> None:
        self._layout, self._dtype = layout, dtype
        self._hashing: Hashing | None = hashing
        self._expected: dict[str, _Parameter] = {}

    def add(self, parcel: Parcel) -> None:
        """Take note of tensors that were sent."""
        if self._hashing is None:  # names are all that counts: nothing is laid together
            parcel = parcel._replace(
                tensors=[(name, tensor.to("meta")) for name, tensor in parcel.tensors]
            )
        for name, tensor in parcel.tensors:
            if (part := self._layout.expert_part(name, tensor)) is not None:
                self._expect(*part)
        for name, slices in self._layout.slices(parcel.tensors):
            self._expect(name, 0, 1, slices)

    def _expect(self, name: str, place: int, places: int, slices: list[torch.Tensor]) -> None:
        for rank, tensor in enumerate(slices):
            key = name if self._layout.ranks == 1 else f"rank{rank}.{name}"
            found = self._expected.setdefault(key, _Parameter(places, self._hashing))
            found.add(place, tensor.to(self._dtype))

    def compare(self, servers: list[dict[str, str]]) -> None:
        """WeightMismatchError names the first parameter that a server does not have as it was
        sent.
        """
        for name, expected in self._expected.items():
            if expected.missing:
                raise WeightMismatchError(
                    f"{name}: part {expected.missing[0]} of {expected.places} was never sent"
                )
        checksums = {name: expected.checksum for name, expected in self._expected.items()}
        for number, found in enumerate(servers):
            if unknown := sorted(checksums.keys() - found.keys()):
                raise WeightMismatchError(
                    f"server {number}: was sent {unknown[0]}, which it does not have"
                )
            if unsent := sorted(found.keys() - checksums.keys()):
                raise WeightMismatchError(f"server {number}: has {unsent[0]}, which was never sent")
            for name, checksum in checksums.items():
                if checksum is not None and found[name] != checksum:
                    raise WeightMismatchError(
                        f"server {number}: {name} is not what was sent: {found[name]}"
                    )
            for name, value in servers[0].items():
                if found.get(name) != value:
                    raise WeightMismatchError(f"server {number}: {name} differs from server 0's")


class _Parameter:
    """An engine's parameter, whose `places` parts may come in any order."""

    def __init__(self, places: int, hashing: Hashing | None) -> None:
        self.places = places
        self._sha = hashlib.sha256() if hashing == "sha256" else None
        self._words = hashing == "fmix32" and places == 1
        self._whole: str | None = None
        self._hashed = 0
        self._came: set[int] = set()
        self._early: dict[int, torch.Tensor] = {}

    @property
    def missing(self) -> list[int]:
        """The parts that have not come."""
        return [place for place in range(self.places) if place not in self._came]

    @property
    def checksum(self) -> str | None:
        """None if nothing is known of it."""
        return self._sha.digest()[:8].hex() if self._sha else self._whole

    def add(self, place: int, part: torch.Tensor) -> None:
        """Take note of a part."""
        self._came.add(place)
        if self._words:
            self._whole = fmix32(part)
        if self._sha is None:
            return
        # its memory will be another bucket's
        self._early[place] = part if place == self._hashed else part.clone()
        while (following := self._early.pop(self._hashed, None)) is not None:
            raw = following.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            self._sha.update(raw.numpy().data)
            self._hashed += 1


# -- as SGLang hashes on a GPU (0.5.23, kernels/ops/memory/gpu_tensor_hash.py)
# -----------------------------------------

_TILE = 8192  # words
_TILES = 256  # taken at once: 16 MiB of 64-bit words, and as much again a few times over
_SEED = 0x243F6A88
_SEEDS = (_SEED, ((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF)
_PLACES = ((0x27D4EB2D, 15), (0x165667B1, 13))
_32, _64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


def fmix32(tensor: torch.Tensor) -> str:
    """SGLang's checksum of a parameter on a GPU, computed wherever `tensor` is.

    Its 32-bit words, each mixed with its place by MurmurHash3's finaliser (Appleby), are summed in
    tiles, under two seeds; the mixed sums of all tiles are the halves of one 64-bit sum, mixed by
    SplitMix64's (Steele et al. 2014).
    """
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = torch.nn.functional.pad(raw, (0, -raw.numel() % 4)).view(torch.int32)
    total = 0
    for start in range(0, words.numel(), _TILE * _TILES):
        halves = zip(*_tile_hashes(words, start), strict=True)
        total += sum(high << 32 | low for high, low in halves)
    return f"{_splitmix64(total & _64) if words.numel() else 0:016x}"


def _tile_hashes(words: torch.Tensor, start: int) -> Iterator[list[int]]:
    """The hashes of up to `_TILES` tiles from word `start` on, under each seed. 64-bit numbers hold
    unsigned words.
    """
    chunk = words[start : start + _TILE * _TILES].long() & _32
    place = torch.arange(start, start + chunk.numel(), device=words.device)
    for seed, (factor, turn) in zip(_SEEDS, _PLACES, strict=True):
        turned = (place << turn & _32) | place >> (32 - turn)
        mixed = _mix(chunk ^ ((place * factor + seed & _32) ^ turned))
        mixed = torch.nn.functional.pad(mixed, (0, -chunk.numel() % _TILE)).view(-1, _TILE)
        yield _mix((mixed.sum(1) & _32) ^ (words.numel() * 4 & _32)).tolist()


def _mix(words: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's finaliser. Products wrap round at 64 bits, and their low 32 are right all the
    same.
    """
    words = (words ^ words >> 16) * 0x85EBCA6B & _32
    words = (words ^ words >> 13) * 0xC2B2AE35 & _32
    return words ^ words >> 16


def _splitmix64(number: int) -> int:
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & _64
    number = (number ^ number >> 27) * 0x94D049BB133111EB & _64
    return number ^ number >> 31
