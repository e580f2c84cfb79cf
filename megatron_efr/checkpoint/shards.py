"""Megatron's sharded format, written by this process: planned by all ranks, written by each, sealed
by all.
"""

from __future__ import annotations

import megatron_efr.transformer_engine  # noqa: F401 - before Megatron

# isort: split
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies import common
from megatron.core.dist_checkpointing.strategies import torch as torch_format
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch.distributed.checkpoint.utils import _DistWrapper

from megatron_efr.checkpoint.manifest import CheckpointError
from megatron_efr.checkpoint.torch_dist import COMMON_FILE

# what says that a file cannot be written; torch's archive writer says the latter
UNWRITTEN = (OSError, RuntimeError)


def check_readable(checkpoint: Path) -> None:
    """CheckpointError if the installed Megatron-Core is too old for a checkpoint.

    Up to 0.18 it looks for what is common to all ranks in a file of its own, of which newer ones
    have none.
    """
    if (checkpoint / COMMON_FILE).is_file() or not hasattr(common, "TorchCommonLoadStrategy"):
        return
    raise CheckpointError(
        f"{checkpoint}: is by Megatron-Core 0.19 or later, and {version('megatron-core')}, which "
        "is installed, cannot take it up: install on Python 3.12 or 3.13 (PYTHON=python3.12 bash "
        "launch/setup.sh); or begin anew from its weights alone, after efr convert megatron-to-hf "
        f"{checkpoint} FOLDER"
    )


class Shards(torch_format.TorchDistSaveShardedStrategy):
    """Strategy for `dist_checkpointing.save(..., async_sharded_save=True)`; it returns the request
    to carry out.

    The request's function writes this rank's file, calls no collective and may run in a thread; its
    finalize functions are for all ranks together, once it has returned on each, and raise OSError
    on all if one could not write. With `copied` the tensors are copied to host memory first, and
    training may go on meanwhile.

    Megatron-Core's own writers are processes: the persistent one is spawned, the other forked (in a
    process with CUDA and gloo threads), and both write through a queue served by a third. They take
    seconds to start and, when the run is killed, live on with its memory and output pipe, so that
    whoever reads that pipe waits for ever.
    """

    def __init__(self, group: dist.ProcessGroup, copied: bool) -> None:
        super().__init__("torch_dist", 1)
        self._group, self._copied = group, copied

    def async_save(
        self,
        sharded_state_dict: dict[str, Any],
        checkpoint_dir: str | Path,
        async_strategy: str | None = None,
    ) -> AsyncRequest:
        """Plan the save. `async_strategy` names one of Megatron's writers, from 0.17 on; it is not
        asked.
        """
        sharded, _, _ = torch_format._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        if self._copied:
            sharded = {key: [_copy(shard) for shard in shards] for key, shards in sharded.items()}
        write = _Write(
            torch_format.mcore_to_pyt_state_dict(sharded, False), Path(checkpoint_dir), self._group
        )
        return AsyncRequest(write.own_file, (), [write.seal])


class _Write:
    """torch.distributed.checkpoint's save, parted at the point at which its ranks meet."""

    def __init__(self, state: dict[str, Any], folder: Path, group: dist.ProcessGroup) -> None:
        self._planner = torch_format.MCoreSavePlanner(
            dedup_replicated_tensors=False, flatten_state_dict=False
        )
        self._writer = torch_checkpoint.FileSystemWriter(folder)
        self._ranks = _DistWrapper(group, True, 0)
        self._metadata: Any = None
        # -1: as it is
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else -1
        self._written: Any = None
        self._failure: Exception | None = None
        plan = self._meet(
            self._ranks.reduce_scatter, "plan", lambda: self._own_plan(state), self._common_plan
        )
        self._plan = self._planner.finish_plan(plan)
        self._file = folder / f"{self._plan.storage_data.prefix}0.distcp"

    def _own_plan(self, state: dict[str, Any]) -> Any:
        self._planner.set_up_planner(state, is_coordinator=self._ranks.is_coordinator)
        self._writer.set_up_storage_writer(self._ranks.is_coordinator)
        return self._writer.prepare_local_plan(self._planner.create_local_plan())

    def _common_plan(self, plans: list[Any]) -> list[Any]:
        plans, self._metadata = self._planner.create_global_plan(plans)
        return self._writer.prepare_global_plan(plans)

    def own_file(self) -> None:
        """Write this rank's shards. What goes wrong is kept for `seal`, which tells every rank.

        torch copies from the GPU without waiting, and then waits for the thread's current device:
        in a new thread that is the first GPU, whichever this rank's is, and what is written might
        not have arrived yet.
        """
        try:
            with torch.cuda.device(self._device):
                self._written = self._writer.write_data(self._plan, self._planner).value()
        except Exception as error:
            self._failure = (
                OSError(f"{self._file}: {error}") if isinstance(error, UNWRITTEN) else error
            )

    def seal(self) -> None:
        """Write the metadata, which makes the files of all ranks one checkpoint."""
        self._meet(self._ranks.all_reduce, "write", self._outcome, self._write_metadata)

    def _outcome(self) -> Any:
        if self._failure is not None:
            raise self._failure
        return self._written

    def _write_metadata(self, written: list[Any]) -> None:
        self._writer.finish(metadata=self._metadata, results=written)

    @staticmethod
    def _meet(collective: Any, *arguments: Any) -> Any:
        """Call torch's collective, which hands every rank the errors of all; the disk's come out as
        OSError.
        """
        try:
            return collective(*arguments)
        except torch_checkpoint.CheckpointException as error:
            for cause, _ in error.failures.values():
                if isinstance(cause, OSError):
                    raise OSError(str(cause)) from error
            raise


def _copy(shard: Any) -> Any:
    """The shard with its tensor copied to host memory; an object that is no tensor is pickled right
    away anyhow.
    """
    if not isinstance(shard, ShardedTensor) or shard.data is None:
        return shard
    return replace(shard, data=shard.data.detach().to("cpu", copy=True))
