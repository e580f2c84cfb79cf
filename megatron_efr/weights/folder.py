"""Hugging Face model folders: read tensor by tensor, drawn from a seed, fingerprinted, written
back.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_efr.config import ConfigError, ModelConfig
from megatron_efr.durable import whole_folder
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.located import INDEX, SINGLE, locate, some
from megatron_efr.weights.mapping import WeightMapping

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SHARD_BYTES = 4 * 2**30
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_ROWS = 4096  # of a tensor that are compared at once


class TensorSource(ABC):
    """A model's whole Hugging Face tensors by name, made or read one at a time: `source[name]`."""

    def __init__(self, architecture: Architecture) -> None:
        self.shapes = WeightMapping(architecture).shapes()

    @abstractmethod
    def __getitem__(self, name: str) -> torch.Tensor: ...

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every (Hugging Face name, whole tensor), in the order in which weights are sent."""
        return ((name, self[name]) for name in self.shapes)


def initial_weights(model: ModelConfig, architecture: Architecture, seed: int) -> TensorSource:
    """The weights that `model` starts from: its folder's, or random ones drawn from `seed`."""
    if model.init == "random":
        return RandomWeights(architecture, seed)
    return FolderWeights(model.path, architecture)


class FolderWeights(TensorSource):
    """The safetensors of a model folder. Every expected tensor must be there with its shape, in a
    type that weights have, before any is read; one that is not finite is refused when it is read.
    """

    def __init__(self, folder: str | Path, architecture: Architecture) -> None:
        super().__init__(architecture)
        self.folder = Path(folder)
        self._stored = locate(self.folder)
        self._check()
        if architecture.tied and HEAD in self._stored:
            self._check_head()

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._stored[name].file, framework="pt") as file:
            tensor = file.get_tensor(name)
        # one pass without a copy: what is not finite makes the sum so, and large finite numbers
        # hardly ever do
        if not math.isfinite(tensor.sum(dtype=torch.float32)) and not tensor.isfinite().all():
            raise ConfigError(
                f"model.path: {self._stored[name].file}: {name} holds numbers that are not "
                "finite; the weights are damaged: take an earlier checkpoint, or fetch them again"
            )
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """The stored type of a tensor, from the file's header."""
        return _DTYPES[self._stored[name].dtype]

    def read_all(self) -> None:
        """Read every tensor once; ConfigError for one that is not finite."""
        for _ in self.items():
            pass

    def _check(self) -> None:
        missing = sorted(self.shapes.keys() - self._stored.keys())
        # a tied model may carry its head a second time; rotary buffers come from old exports
        extra = sorted(
            name
            for name in self._stored.keys() - self.shapes.keys()
            if name != HEAD and not name.endswith("rotary_emb.inv_freq")
        )
        for name, stored in self._stored.items():
            if stored.dtype not in _DTYPES and name not in extra:
                raise ConfigError(
                    f"model.path: {stored.file}: {name} is stored as {stored.dtype}; supported: "
                    f"{', '.join(_DTYPES)}. Quantised weights are not read: take the folder that "
                    "they were made from"
                )
        if missing or extra:
            raise ConfigError(
                f"model.path: {self.folder}: the tensors are not those of its config.json; "
                f"missing {some(missing)}, unexpected {some(extra)}"
            )
        for name, shape in self.shapes.items():
            if (stored := self._stored[name]).shape != shape:
                raise ConfigError(
                    f"model.path: {stored.file}: {name} is {stored.shape}, config.json makes it "
                    f"{shape}"
                )

    def _check_head(self) -> None:
        """Refuse a head of its own if config.json ties it: transformers then unties the two, SGLang
        drops it.
        """
        head, embedding = self._stored[HEAD], self._stored[EMBEDDING]
        if head.shape == embedding.shape:
            with (
                safe_open(head.file, framework="pt") as one,
                safe_open(embedding.file, framework="pt") as other,
            ):
                parts = one.get_slice(HEAD), other.get_slice(EMBEDDING)
                starts = range(0, head.shape[0], _ROWS)
                if all(
                    torch.equal(*(part[at : at + _ROWS].float() for part in parts)) for at in starts
                ):
                    return
        raise ConfigError(
            f"model.path: {head.file}: {HEAD} is not {EMBEDDING}, and config.json says "
            "tie_word_embeddings: true; set that to false to use the head, or take the tensor out"
        )


class RandomWeights(TensorSource):
    """Fresh weights as transformers initialises them: a function of (seed, tensor name), so the
    same in any layout.
    """

    def __init__(self, architecture: Architecture, seed: int) -> None:
        super().__init__(architecture)
        self.seed = seed
        self.std = architecture.initializer_range

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        if name.endswith(".bias"):
            return torch.zeros(shape)
        return torch.empty(shape).normal_(0.0, self.std, generator=generator(self.seed, name))


def generator(seed: int, name: str) -> torch.Generator:
    """Random numbers of their own for tensor `name`."""
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def as_folder(weights: TensorSource, place: Path, template: str | Path) -> Path:
    """A model folder with `weights`: the one that they lie in, or else one written to `place` (see
    `save_folder`).
    """
    if isinstance(weights, FolderWeights):
        weights.read_all()  # whoever takes the folder checks nothing
        return weights.folder
    save_folder(place, weights.items(), template)
    return place


def fingerprint(folder: str | Path, seed: int | None = None) -> str:
    """SHA-256 over config.json and the weights: the safetensors' bytes, or the seed that random
    weights come from.
    """
    digest = hashlib.sha256((Path(folder) / "config.json").read_bytes())
    if seed is not None:
        digest.update(f"random weights, seed {seed}".encode())
    else:
        for path in sorted({stored.file for stored in locate(Path(folder)).values()}):
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
    """Write `tensors` (Hugging Face names, whole) as a model folder, with everything but the
    weights from `template`.

    config.json names the tensors' type if the template's was another: transformers loads in the
    type it finds there. Complete or absent: the folder is built beside its place and moved there.
    At most one shard is held in memory.
    """
    with whole_folder(Path(destination)) as partial:
        copy_all_but_weights(Path(template), partial)
        _name_dtype(partial / "config.json", _write_shards(partial, tensors, shard_bytes))


def copy_all_but_weights(source: Path, destination: Path) -> None:
    """Copy a model folder's configuration, tokenizer and other files beside its weights."""
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(
            (".safetensors", ".safetensors.index.json", ".bin", ".pt")
        ):
            shutil.copy(path, destination / path.name)


def _name_dtype(config: Path, dtypes: set[torch.dtype]) -> None:
    raw = json.loads(config.read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in raw else "dtype"
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    if len(names) == 1 and raw.get(key) not in names:
        config.write_text(json.dumps(raw | {key: names.pop()}, indent=2) + "\n", encoding="utf-8")


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int
) -> set[torch.dtype]:
    """Write the safetensors, and their index if there are several; returns the types that occur."""
    shards: list[list[str]] = []
    dtypes: set[torch.dtype] = set()
    total = 0
    for shard in _batches(tensors, shard_bytes):
        save_tensors(shard, folder / f"shard-{len(shards)}.safetensors")
        total += sum(tensor.nbytes for tensor in shard.values())
        dtypes |= {tensor.dtype for tensor in shard.values()}
        shards.append(list(shard))
    if len(shards) == 1:
        os.rename(folder / "shard-0.safetensors", folder / SINGLE)
        return dtypes
    index: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(folder / f"shard-{number}.safetensors", folder / file)
        index |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    )
    return dtypes


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write contiguous tensors in host memory as one safetensors file; OSError if the disk does not
    take it.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # what it says of a full disk
        raise OSError(str(error)) from error


def _batches(
    tensors: Iterable[tuple[str, torch.Tensor]], limit: int
) -> Iterator[dict[str, torch.Tensor]]:
    batch: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if batch and size + tensor.nbytes > limit:
            yield batch
            # whoever took it may still name it: it must be gone before the next fills up
            batch.clear()
            size = 0
        batch[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
    yield batch
