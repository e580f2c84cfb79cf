"""Hugging Face model folders: read tensor by tensor, drawn from a seed, fingerprinted, written back."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_efr.config import ConfigError, ModelConfig
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.mapping import WeightMapping

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class TensorSource(ABC):
    """A model's whole Hugging Face tensors by name, made or read one at a time: `source[name]`."""

    def __init__(self, architecture: Architecture) -> None:
        self.shapes = WeightMapping(architecture).shapes()

    @abstractmethod
    def __getitem__(self, name: str) -> torch.Tensor: ...

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every (name, tensor), in the order in which weights are sent."""
        return ((name, self[name]) for name in self.shapes)


def initial_weights(model: ModelConfig, architecture: Architecture, seed: int) -> TensorSource:
    """The weights that `model` starts from: its folder's, or random ones drawn from `seed`."""
    if model.init == "random":
        return RandomWeights(architecture, seed)
    return FolderWeights(model.path, architecture)


class FolderWeights(TensorSource):
    """The safetensors of a model folder. Every expected tensor must be there with its shape, before any is read."""

    def __init__(self, folder: str | Path, architecture: Architecture) -> None:
        super().__init__(architecture)
        self.folder = Path(folder)
        self._files = _locate(self.folder)
        self._check(self.shapes)

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """The stored type of a tensor, from the file's header; ConfigError for one that weights do not have."""
        with safe_open(self._files[name], framework="pt") as file:
            stored = file.get_slice(name).get_dtype()
        if stored not in _DTYPES:
            raise ConfigError(f"{self._files[name]}: {name} is stored as {stored}; supported: {', '.join(_DTYPES)}")
        return _DTYPES[stored]

    def _check(self, expected: dict[str, tuple[int, ...]]) -> None:
        missing = sorted(expected.keys() - self._files.keys())
        # a tied model may carry its head a second time; rotary buffers come from old exports
        extra = sorted(
            name
            for name in self._files.keys() - expected.keys()
            if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq")
        )
        if missing or extra:
            raise ConfigError(
                f"model.path: {self.folder}: the tensors are not those of its config.json; "
                f"missing {_some(missing)}, unexpected {_some(extra)}"
            )
        for name, shape in expected.items():
            with safe_open(self._files[name], framework="pt") as file:
                found = tuple(file.get_slice(name).get_shape())
            if found != shape:
                raise ConfigError(f"model.path: {self._files[name]}: {name} is {found}, config.json makes it {shape}")


class RandomWeights(TensorSource):
    """Fresh weights as transformers initialises them: a function of (seed, tensor name), so the same in any layout."""

    def __init__(self, architecture: Architecture, seed: int) -> None:
        super().__init__(architecture)
        self.seed, self.std = seed, architecture.initializer_range

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        if name.endswith(".bias"):
            return torch.zeros(shape)
        key = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        return torch.empty(shape).normal_(0.0, self.std, generator=generator)


def as_folder(weights: TensorSource, place: Path, template: str | Path) -> Path:
    """A model folder with `weights`: the one that they lie in, or else one written to `place` (see `save_folder`)."""
    if isinstance(weights, FolderWeights):
        return weights.folder
    save_folder(place, weights.items(), template)
    return place


def fingerprint(folder: str | Path, seed: int | None = None) -> str:
    """SHA-256 over config.json and the weights: the safetensors' bytes, or the seed that random weights come from."""
    digest = hashlib.sha256((Path(folder) / "config.json").read_bytes())
    if seed is not None:
        digest.update(f"random weights, seed {seed}".encode())
    else:
        for path in sorted(set(_locate(Path(folder)).values())):
            with path.open("rb") as file:
                while block := file.read(2**24):
                    digest.update(block)
    return digest.hexdigest()


def save_folder(
    destination: str | Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    template: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `tensors` (Hugging Face names, whole) as a model folder, with everything but the weights from `template`.

    config.json names the tensors' type where the template's was another: transformers loads in the type it finds there.
    Complete or absent: the folder is built beside its place and moved there. At most one shard is held in memory.
    """
    destination = Path(destination)
    partial = destination.with_name(destination.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    copy_all_but_weights(Path(template), partial)
    _name_dtype(partial / "config.json", _write_shards(partial, tensors, shard_bytes))
    if destination.exists():
        shutil.rmtree(destination)
    os.replace(partial, destination)


def copy_all_but_weights(source: Path, destination: Path) -> None:
    """Copy a model folder's configuration, tokenizer and other files beside its weights."""
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith((".safetensors", ".safetensors.index.json", ".bin", ".pt")):
            shutil.copy(path, destination / path.name)


def _name_dtype(config: Path, dtypes: set[torch.dtype]) -> None:
    raw = json.loads(config.read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in raw else "dtype"
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    if len(names) == 1 and raw.get(key) not in names:
        config.write_text(json.dumps(raw | {key: names.pop()}, indent=2) + "\n", encoding="utf-8")


def _write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int) -> set[torch.dtype]:
    """Write the safetensors, and their index where there are several; returns the types that occur."""
    shards: list[list[str]] = []
    dtypes: set[torch.dtype] = set()
    total = 0
    for shard in _batches(tensors, shard_bytes):
        save_file(shard, folder / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in shard.values())
        dtypes |= {tensor.dtype for tensor in shard.values()}
        shards.append(list(shard))
    if len(shards) == 1:
        os.rename(folder / "shard-0.safetensors", folder / _SINGLE)
        return dtypes
    index: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(folder / f"shard-{number}.safetensors", folder / file)
        index |= dict.fromkeys(names, file)
    (folder / _INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1))
    return dtypes


def _batches(tensors: Iterable[tuple[str, torch.Tensor]], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    batch: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if batch and size + tensor.nbytes > limit:
            yield batch
            batch.clear()  # whoever took it may still name it: it must be gone before the next fills up
            size = 0
        batch[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
    yield batch


def _locate(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    index = folder / _INDEX
    if index.is_file():
        files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        absent = sorted({str(path) for path in files.values() if not path.is_file()})
        if absent:
            raise ConfigError(f"model.path: {index} names files that are not there: {_some(absent)}")
        return files
    single = folder / _SINGLE
    if not single.is_file():
        raise ConfigError(
            f"model.path: {folder}: neither {_SINGLE} nor {_INDEX} found; "
            f"set model.init: random to start from fresh weights"
        )
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def _some(names: list[str]) -> str:
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "none"
