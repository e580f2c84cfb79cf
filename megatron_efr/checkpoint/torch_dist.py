"""The model part of a Megatron checkpoint (torch_dist), written and read tensor by tensor, without
Megatron.

Megatron-Core keeps one global tensor for all layers, and for all experts of all layers: its leading
axes count them (`TransformerBlock.sharded_state_dict`). Such a tensor is stored in chunks. A
process alone writes one chunk per parameter, two if gate and up are fused; other layouts cut
otherwise, and any of them is read here.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint import planner_helpers
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_efr.config import ConfigError, LoraConfig
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import FolderWeights, TensorSource
from megatron_efr.weights.lora import ALPHA, merge, shape_of_adapters, tensor_names
from megatron_efr.weights.mapping import WeightMapping

COMMON = "common_state/shard_0_1"  # the object
COMMON_FILE = "common.pt"
# what `dist_checkpointing.load` looks for beside torch's own files
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class _Place:
    """The place of a parameter in the checkpoint: its tensor's name, and (index, count) along each
    leading axis.
    """

    key: str
    axes: tuple[tuple[int, int], ...]

    @property
    def first(self) -> tuple[int, ...]:
        return tuple(index for index, _ in self.axes)

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The global tensor's shape, of parameters of `shape`."""
        return tuple(count for _, count in self.axes) + shape


def _place(name: str, a: Architecture) -> _Place:
    """The place of a parameter named as `WeightMapping.parameters` does."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        return _Place(name, ())
    layer = int(match[1])
    rest = match[2]
    # layer norms go by Transformer Engine's names, in which they belong to the linear layer that
    # follows
    rest = rest.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    rest = rest.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    axes = ((layer, a.layers),)
    if expert := re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.(.+)", rest):
        assert a.experts is not None
        rest = f"mlp.experts.experts.{expert[2]}"
        axes += ((int(expert[1]), a.experts.count),)
    return _Place(f"decoder.layers.{rest}", axes)


# -- writing
# --------------------------------------------------------------------------------------------------


def write(folder: Path, source: FolderWeights, architecture: Architecture) -> None:
    """Write `source` as a process alone would save it, into an empty folder; one tensor in memory
    at a time.

    ConfigError if the tensors that make up one of Megatron's are not of one type, OSError if
    writing fails.
    """
    planner = _Writer(source, architecture)
    writer = torch_checkpoint.FileSystemWriter(folder)
    try:
        torch_checkpoint.save({}, storage_writer=writer, planner=planner, no_dist=True)
    except torch_checkpoint.CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, (OSError, ConfigError)):
                raise cause from error
        raise
    (folder / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")
    torch.save({}, folder / COMMON_FILE)


class _Writer(torch_checkpoint.DefaultSavePlanner):
    """Plans from names and shapes alone; torch's writer asks for each chunk's data when it comes to
    write it.
    """

    def __init__(self, source: FolderWeights, architecture: Architecture) -> None:
        super().__init__(flatten_state_dict=False)
        self._source, self._architecture = source, architecture
        self._mapping = WeightMapping(architecture)
        # parameter, and which of its sources alone
        self._parts: dict[MetadataIndex, tuple[str, int | None]] = {}

    def create_local_plan(self) -> SavePlan:
        dtypes: dict[str, torch.dtype] = {}
        items = [WriteItem(index=MetadataIndex(COMMON), type=WriteItemType.BYTE_IO)]
        for name in self._mapping.parameters():
            for item in self._items(name):
                assert item.tensor_data is not None
                dtype = item.tensor_data.properties.dtype
                if dtypes.setdefault(item.index.fqn, dtype) != dtype:
                    raise ConfigError(
                        f"{self._source.folder}: {name} is {dtype} and others like it are not"
                    )
                items.append(item)
            if re.search(r"\.linear_(qkv|proj|fc1|fc2)\.weight$", name):
                items.append(self._extra_state(name))
        self.plan = SavePlan(items)
        return self.plan

    def _items(self, name: str) -> Iterator[WriteItem]:
        """The chunks of one parameter."""
        # q, k and v, or gate and up, become one parameter, and a parameter has one type
        mapping = self._mapping
        sources = self._mapping.sources(name)
        kinds = {self._source.dtype(source) for source in sources}
        if len(kinds) > 1:
            raise ConfigError(
                f"{self._source.folder}: {' and '.join(sources)} differ in type; Megatron holds "
                "them in one"
            )
        # layers, and experts, are leading axes of one global tensor
        place = _place(name, self._architecture)
        shape = mapping.shape(name)
        # each half is a chunk, and a tensor of the folder as it stands
        alone = mapping.split(name) == "gate_up"
        rows = shape[0] // len(sources) if alone else shape[0]
        for number in range(len(sources) if alone else 1):
            chunk = ChunkStorageMetadata(
                offsets=torch.Size((*place.first, number * rows, *(0 for _ in shape[1:]))),
                sizes=torch.Size((*(1 for _ in place.axes), rows, *shape[1:])),
            )
            item = WriteItem(
                index=MetadataIndex(place.key, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk, TensorProperties(dtype=next(iter(kinds))), torch.Size(place.whole(shape))
                ),
            )
            # the data is read when the writer asks for this chunk, one tensor at a time
            self._parts[item.index] = name, number if alone else None
            yield item

    def _extra_state(self, name: str) -> WriteItem:
        """The entry that Megatron stores for a linear layer beside its weight: nothing, but it must
        be there.
        """
        place = _place(name.removesuffix("weight") + "_extra_state", self._architecture)
        first, counts = (".".join(str(n) for n in axis) for axis in zip(*place.axes, strict=True))
        return WriteItem(
            index=MetadataIndex(f"{place.key}/shard_{first}_{counts}"), type=WriteItemType.BYTE_IO
        )

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            nothing = io.BytesIO()
            torch.save([{} if write_item.index.fqn == COMMON else None], nothing)
            return nothing
        name, number = self._parts[write_item.index]
        sources = self._mapping.sources(name)
        if number is not None:
            tensor = self._source[sources[number]]
        else:
            tensor = self._mapping.to_megatron(
                name, {source: self._source[source] for source in sources}, 0
            )
        assert write_item.tensor_data is not None
        return tensor.reshape(write_item.tensor_data.chunk.sizes)


# -- reading
# --------------------------------------------------------------------------------------------------


class CheckpointWeights(TensorSource):
    """The Hugging Face tensors of a Megatron checkpoint's model, whatever layout saved it, read one
    at a time.

    Low-rank adapters that were trained beside them are added to them, and are to be had alone:
    `adapters`. Every tensor must be there with its shape before any is read: ConfigError names what
    is not.
    """

    def __init__(self, folder: str | Path, architecture: Architecture) -> None:
        super().__init__(architecture)
        self.folder = Path(folder)
        self.architecture = architecture
        self.mapping = WeightMapping(architecture)
        self._owners = {
            source: name
            for name in self.mapping.parameters()
            for source in self.mapping.sources(name)
        }
        self._reader = torch_checkpoint.FileSystemReader(self.folder)
        self._stored = read_metadata(self.folder)
        self._reader.set_up_storage_reader(self._stored, is_coordinator=True)
        # q, k and v are asked for one after the other
        self._last: tuple[str, dict[str, torch.Tensor]] = "", {}
        self._check()

    def __getitem__(self, name: str) -> torch.Tensor:
        owner = self._owners[name]
        if self._last[0] != owner:
            self._last = "", {}  # let go of it first
            self._last = owner, dict(self.mapping.to_hugging_face(owner, [self.parameter(owner)]))
        return self._merged(name, self._last[1][name])

    @cached_property
    def lora(self) -> LoraConfig | None:
        """Rank, alpha and targets of the low-rank adapters; None if none were trained."""
        found = shape_of_adapters(
            {key: tuple(tensor.size) for key, tensor in self._tensors.items()}
        )
        if found is None:
            return None
        if ALPHA not in self._tensors:
            raise ConfigError(
                f"{self.folder}: holds low-rank adapters, and no {ALPHA} to merge them with"
            )
        rank, targets = found
        return LoraConfig.model_validate(
            {"rank": rank, "alpha": float(self._whole(ALPHA)), "targets": targets}
        )

    def adapters(self) -> dict[str, torch.Tensor]:
        """Every adapter tensor by PEFT's name, in the order of the weights that they are beside."""
        pairs = (tensor_names(name.removesuffix(".weight")) for name in self.shapes)
        return {
            name: self._whole(name) for pair in pairs if pair[0] in self._tensors for name in pair
        }

    def _merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A weight with the adapter that stands beside it, if any."""
        a, b = tensor_names(name.removesuffix(".weight"))
        if self.lora is None or a not in self._tensors:
            return weight
        return merge(weight, self._whole(a), self._whole(b), self.lora.scaling)

    def _whole(self, key: str) -> torch.Tensor:
        """A tensor of the checkpoint that is one of its own, and not a part of a larger one."""
        if key not in self._tensors:
            raise ConfigError(
                f"{self.folder}: no tensor {key}, and the adapters are of no use without"
            )
        stored = self._tensors[key]
        return self._read(
            key, stored, ChunkStorageMetadata(torch.Size([0] * len(stored.size)), stored.size)
        )

    def parameter(self, name: str) -> torch.Tensor:
        """Megatron parameter `name`, whole; a vocabulary without its padding."""
        place = self._find(name)
        shape = self._shape(name)
        wanted = ChunkStorageMetadata(
            offsets=torch.Size((*place.first, *(0 for _ in shape))),
            sizes=torch.Size((*(1 for _ in place.axes), *shape)),
        )
        stored = self._tensors[place.key]
        chunks = self._chunks[place.key, place.first]
        near = TensorStorageMetadata(properties=stored.properties, size=stored.size, chunks=chunks)
        return self._read(place.key, near, wanted, name).reshape(shape)

    def _read(
        self,
        key: str,
        stored: TensorStorageMetadata,
        wanted: ChunkStorageMetadata,
        name: str = "it",
    ) -> torch.Tensor:
        """The `wanted` part of a tensor, put together from the chunks that are `stored`."""
        items = planner_helpers.create_read_items_for_chunk_list(key, stored, [wanted])
        result = torch.empty(wanted.sizes, dtype=stored.properties.dtype)
        if sum(torch.Size(item.lengths).numel() for item in items) != result.numel():
            raise ConfigError(f"{self.folder}: {key}: parts of {name} are missing")
        self._reader.read_data(LoadPlan(items), cast(Any, _Into(result))).wait()
        return result

    @cached_property
    def _tensors(self) -> dict[str, TensorStorageMetadata]:
        return {
            k: v
            for k, v in self._stored.state_dict_metadata.items()
            if isinstance(v, TensorStorageMetadata)
        }

    @cached_property
    def _chunks(self) -> dict[tuple[str, tuple[int, ...]], list[ChunkStorageMetadata]]:
        """Chunks by tensor and by layer (and expert): a search through all of them for each
        parameter takes hours.
        """
        axes = {place.key: len(place.axes) for place in map(self._find, self.mapping.parameters())}
        found: dict[tuple[str, tuple[int, ...]], list[ChunkStorageMetadata]] = {}
        for key, leading in axes.items():
            for chunk in self._tensors[key].chunks:
                if any(size != 1 for size in chunk.sizes[:leading]):
                    raise ConfigError(
                        f"{self.folder}: {key} holds several layers or experts in one chunk"
                    )
                found.setdefault((key, tuple(chunk.offsets[:leading])), []).append(chunk)
        return found

    def _find(self, name: str) -> _Place:
        """The place of a parameter. Layers from Transformer Engine keep the norm before experts
        under its own name.
        """
        place = _place(name, self.architecture)
        own = "decoder.layers.pre_mlp_layernorm.weight"
        if (
            name.endswith(".pre_mlp_layernorm.weight")
            and place.key not in self._tensors
            and own in self._tensors
        ):
            return _Place(own, place.axes)
        return place

    def _shape(self, name: str) -> tuple[int, ...]:
        if self.mapping.split(name) == "vocab":
            return self.shapes[self.mapping.sources(name)[0]]
        return self.mapping.shape(name)

    def _check(self) -> None:
        for name in self.mapping.parameters():
            place = self._find(name)
            if place.key not in self._tensors:
                raise ConfigError(
                    f"{self.folder}: no tensor {place.key}; config.json makes it a part of the "
                    "model"
                )
            found = tuple(self._tensors[place.key].size)
            wanted = place.whole(self._shape(name))
            padded = (
                self.mapping.split(name) == "vocab"
                and found[0] >= wanted[0]
                and found[1:] == wanted[1:]
            )
            if found != wanted and not padded:
                raise ConfigError(
                    f"{self.folder}: {place.key} is {found}, config.json makes it {wanted}"
                )
        if self.architecture.tied and "output_layer.weight" in self._tensors:
            raise ConfigError(
                f"{self.folder}: output_layer.weight is there, and config.json ties it to the "
                "embedding"
            )


class _Into:
    """A load planner for one tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        tensor = self._tensor
        for dim, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        return tensor

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: the reader has copied into it."""


def is_checkpoint(folder: Path) -> bool:
    """True if tensors in this format lie there."""
    return (folder / ".metadata").is_file()


def read_metadata(folder: Path) -> Metadata:
    """Read what a checkpoint folder stores, as torch describes it; ConfigError if it is none."""
    if not is_checkpoint(folder):
        raise ConfigError(
            f"{folder}: no checkpoint: no .metadata there; a folder like checkpoints/step_000010 "
            "is expected"
        )
    try:
        stored = torch_checkpoint.FileSystemReader(folder).read_metadata()
    except Exception as error:  # a damaged pickle leads anywhere
        raise ConfigError(
            f"{folder / '.metadata'}: damaged: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(stored, Metadata):
        raise ConfigError(f"{folder / '.metadata'}: damaged: it holds a {type(stored).__name__}")
    return stored
