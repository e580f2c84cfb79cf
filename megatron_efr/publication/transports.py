"""Transports of whole tensors to SGLang's servers: by request, process group or disk.

Nothing here imports SGLang. What is pickled passes its restricted unpickler (0.5.23,
`SafeUnpickler`): tensors, plain containers, and `types.SimpleNamespace` for a flattened bucket's
description, which is read by attribute only.
"""

from __future__ import annotations

import base64
import io
import pickle
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import reductions

from megatron_efr.addresses import kernels_port
from megatron_efr.durable import UnwritableError, writing
from megatron_efr.errors import EngineError, LostError
from megatron_efr.publication.engine_group import EngineGroup
from megatron_efr.publication.publisher import Engines
from megatron_efr.publication.reshard import Parcel
from megatron_efr.publication.sglang_layout import EngineLayout
from megatron_efr.weights.folder import copy_all_but_weights, save_tensors

Prepared = tuple[list[str], str | None]
"""Payloads, one for each engine rank, and their `load_format`."""


class InBand:
    """`tensor` on a CPU: the tensors themselves within the request."""

    everywhere = False

    def __init__(self, engines: Engines | None) -> None:
        self._engines = engines

    def prepare(self, parcel: Parcel) -> Prepared | None:
        if self._engines is None:
            return None
        payload, load_format = encode(parcel)
        return [payload] * self._engines.engine_ranks, load_format

    def begin(self) -> None: ...

    def deliver(self, prepared: Prepared) -> None:
        assert self._engines is not None
        self._engines.update_from_tensor(*prepared)

    def finish(self) -> None: ...

    def abandon(self) -> None: ...


class Sliced(InBand):
    """`tensor` with `load_format="direct"`: each engine rank gets its own slices alone, under
    SGLang's own names.
    """

    def __init__(self, engines: Engines | None, layout: EngineLayout) -> None:
        super().__init__(engines)
        self._layout = layout

    def prepare(self, parcel: Parcel) -> Prepared | None:
        if self._engines is None:
            return None
        fused = list(self._layout.slices(parcel.tensors))
        return [
            _pickled([(n, _own(s[r].cpu())) for n, s in fused]) for r in range(self._layout.ranks)
        ], "direct"


class Handles(InBand):
    """`tensor` for engines on the trainer's GPUs: each rank's bucket stays, its CUDA handle is
    sent.

    Engine rank r of server i runs on the GPU of trainer rank i * engine_ranks + r. A bucket is a
    fresh allocation: torch keeps its memory until the engine, which may copy after it has answered,
    has let go of its handle. The memory of a handle that is never opened it keeps for ever: those
    ranks alone make one whose engine will be sent it.
    """

    everywhere = True

    def __init__(self, engines: Engines | None, cpu_world: dist.ProcessGroup) -> None:
        super().__init__(engines)
        self._cpu_world = cpu_world
        self._receiving: list[bool] = []  # rank 0's, of each rank's engine rank

    def prepare(self, parcel: Parcel) -> Prepared | None:
        mine: list[Any] = [None]
        dist.scatter_object_list(
            mine, self._receiving if self._engines else None, src=0, group=self._cpu_world
        )
        payload = encode(parcel)[0] if mine[0] else ""
        everyone: list[Any] = [None] * dist.get_world_size(self._cpu_world)
        dist.gather_object(
            payload, everyone if self._engines else None, dst=0, group=self._cpu_world
        )
        return (everyone, _load_format(parcel)) if self._engines else None

    def begin(self) -> None:
        assert self._engines is not None
        self._receiving = [
            takes for takes in self._engines.taking_part for _ in range(self._engines.engine_ranks)
        ]

    def deliver(self, prepared: Prepared) -> None:
        try:
            super().deliver(prepared)
        except EngineError:
            self._receiving = [False] * len(self._receiving)  # nothing more is delivered
            raise


class Broadcast:
    """`distributed`: a process group of rank 0 and every engine rank, in which each bucket is one
    broadcast.
    """

    everywhere = False

    def __init__(
        self, engines: Engines | None, address: str, backend: str, limit_s: float = 600.0
    ) -> None:
        self._engines = engines
        self._address = address
        self._backend = backend
        self._limit = timedelta(seconds=limit_s)
        self._group: EngineGroup | None = None

    def prepare(self, parcel: Parcel) -> Parcel:
        return parcel

    def begin(self) -> None:
        """Make the group, unless the last publication left one with these very engines."""
        assert self._engines is not None
        if self._engines.changed:
            self.abandon()
        if self._group is None:
            # a dead trainer's group may still bear another
            name = f"weights-{uuid.uuid4().hex[:12]}"
            port = kernels_port(self._address)
            joining = self._engines.join_group(self._address, port, name, self._backend)
            world = 1 + self._engines.count * self._engines.engine_ranks
            try:
                self._group = EngineGroup(
                    name, self._backend, self._address, port, world, self._limit, joining
                )
            except dist.DistError as error:
                raise LostError(
                    f"weights group {name}: not all of {self._engines.urls} entered it: {error}"
                ) from error

    def deliver(self, prepared: Parcel) -> None:
        assert self._engines is not None
        assert self._group is not None
        names = [name for name, _ in prepared.tensors]
        dtypes = [str(tensor.dtype).removeprefix("torch.") for _, tensor in prepared.tensors]
        shapes = [list(tensor.shape) for _, tensor in prepared.tensors]
        sent = (
            [tensor.contiguous() for _, tensor in prepared.tensors]
            if prepared.flat is None
            else [prepared.flat]
        )
        answer = self._engines.update_from_distributed(
            names,
            dtypes,
            shapes,
            self._group.name,
            None if prepared.flat is None else "flattened_bucket",
        )
        self._group.send(sent)
        answer.result()  # first: an engine that refused will never take part in the broadcast
        self._group.wait()

    def finish(self) -> None: ...

    def abandon(self) -> None:
        """Leave the group, all at once: after a failure its two ends may be out of step.

        An engine may wait in a broadcast for rank 0, and rank 0 for one that refused its part.
        """
        if self._group is not None:
            group = self._group
            self._group = None
            assert self._engines is not None
            leaving = self._engines.leave_group(group.name)
            group.leave()
            leaving.result()


class Disk:
    """`disk`: a model folder that the engines read; for engines that share only a file system with
    the trainer.
    """

    everywhere = False

    def __init__(self, engines: Engines | None, folder: Path, template: Path) -> None:
        self._engines = engines
        self._folder = folder
        self._template = template
        self._files = 0

    def prepare(self, parcel: Parcel) -> Parcel:
        return parcel

    def begin(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        with self._written():
            self._folder.mkdir(parents=True)
            copy_all_but_weights(self._template, self._folder)
        self._files = 0

    def deliver(self, prepared: Parcel) -> None:
        tensors = {name: tensor.to("cpu").contiguous() for name, tensor in prepared.tensors}
        self._files += 1
        with self._written():
            save_tensors(
                {name: _own(tensor) for name, tensor in tensors.items()},
                self._folder / f"model-{self._files:05d}.safetensors",
            )

    def finish(self) -> None:
        assert self._engines is not None
        self._engines.update_from_disk(str(self._folder))

    def abandon(self) -> None: ...

    @contextmanager
    def _written(self) -> Iterator[None]:
        """Let a disk that does not take what this block writes be an EngineError: the other ranks
        hear of those.
        """
        try:
            with writing(self._folder, "the engines have the weights that they had before"):
                yield
        except UnwritableError as error:
            raise EngineError(str(error)) from error


def encode(parcel: Parcel) -> tuple[str, str | None]:
    """A parcel as SGLang unpickles it, base64, and its `load_format`: the tensors on a CPU, their
    handles on CUDA.
    """
    load_format = _load_format(parcel)
    if parcel.flat is None:
        return _pickled([(name, _own(tensor)) for name, tensor in parcel.tensors]), load_format
    described = []
    start = 0
    for name, tensor in parcel.tensors:
        end = start + tensor.nbytes
        fields = {"name": name, "shape": tensor.shape, "dtype": tensor.dtype, "numel": end - start}
        described.append(SimpleNamespace(**fields, start_idx=start, end_idx=end))
        start = end
    return _pickled({"flattened_tensor": _own(parcel.flat), "metadata": described}), load_format


def _load_format(parcel: Parcel) -> str | None:
    return None if parcel.flat is None else "flattened_bucket"


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a storage of its own: pickling a view in host memory would take its whole
    storage along.
    """
    if tensor.is_cuda or (
        tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    ):
        return tensor.detach()
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _pickled(content: Any) -> str:
    """Pickle, base64, with tensors under the names that every torch knows.

    Importing Megatron-Core from 0.17 on replaces torch's `_load_from_bytes` by a function, by whose
    name tensors in host memory are pickled; an engine has no Megatron. It is given torch's name
    back.
    """
    loader: Any = torch.storage._load_from_bytes
    loader.__module__, loader.__qualname__ = "torch.storage", "_load_from_bytes"
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(content)
    return base64.b64encode(buffer.getbuffer()).decode()


class _Pickler(pickle.Pickler):
    """CUDA tensors by handle, their GPU by UUID (its number depends on CUDA_VISIBLE_DEVICES);
    others by value.
    """

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor) or not obj.is_cuda:
            return NotImplemented
        rebuild, given = reductions.reduce_tensor(obj)
        arguments: list[Any] = list(given)
        arguments[_DEVICE] = str(torch.cuda.get_device_properties(arguments[_DEVICE]).uuid)
        return rebuild, tuple(arguments)


# the place of the device among the arguments of
# torch.multiprocessing.reductions.rebuild_cuda_tensor
_DEVICE = 6
