"""Checkpoints: Megatron's sharded state and the run's own, complete or absent, verified before `latest` moves."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as torch_format

from megatron_efr.manifest import STATE, CheckpointError, sync_folder, verify, write_manifest, write_synced

LATEST = "latest"


class World(Protocol):
    """What saving needs of the ranks."""

    @property
    def is_main(self) -> bool: ...

    def barrier(self) -> None: ...

    def share(self, make: Callable[[], Any]) -> Any: ...


class _InThisProcess(torch_format.TorchDistSaveShardedStrategy):
    """Megatron's format, written by this process itself; OSError on every rank where one cannot write.

    Megatron-Core 0.16.1 writes through a server process, which takes seconds to start and, when the run is killed,
    lives on with the run's memory and output pipe, so that whoever reads that pipe waits for ever.
    """

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        sharded, _, _ = torch_format._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        try:
            torch_checkpoint.save(
                torch_format.mcore_to_pyt_state_dict(sharded, False),
                storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir),
                planner=torch_format.MCoreSavePlanner(
                    dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
                ),
            )
        except torch_checkpoint.CheckpointException as error:  # every rank gets every rank's
            for cause, _ in error.failures.values():
                if isinstance(cause, OSError | RuntimeError):  # torch reports a short write as RuntimeError
                    raise OSError(str(cause)) from error
            raise


class Checkpoints:
    """The checkpoints of one run folder: `step_000010/` each, and `latest`, which names the newest that verified.

    A checkpoint is Megatron's distributed format beside `state.json` (the run's own state) and `manifest.json` (size
    and SHA-256 of every file). Written beside its place and renamed: a kill at any moment leaves the older ones.
    """

    def __init__(self, folder: Path, keep: int, world: World) -> None:
        self.folder, self.keep, self._world = folder, keep, world

    def save(self, step: int, sharded: dict[str, Any], state: dict[str, Any]) -> Path:
        """Save on all ranks together, verify, move `latest`, drop what is older than the `keep` newest."""
        final = self.folder / name(step)
        partial = final.with_name(final.name + ".partial")
        try:
            self._world.share(lambda: self._begin(partial))
            dist_checkpointing.save(sharded, str(partial), _InThisProcess("torch_dist", 1))
            self._world.barrier()
            self._world.share(lambda: self._finish(partial, final, state))
        except OSError as error:
            raise CheckpointError(
                f"{final}: cannot be written: {error}; the checkpoints before it are untouched, and --resume goes on "
                f"from the newest"
            ) from error
        return final

    def _begin(self, partial: Path) -> None:
        for left in self.folder.glob("step_*.partial"):  # by a save that was interrupted
            shutil.rmtree(left)
        partial.mkdir(parents=True)

    def _finish(self, partial: Path, final: Path, state: dict[str, Any]) -> None:
        (partial / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        write_manifest(partial)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        sync_folder(self.folder)
        verify(final)
        write_synced(self.folder / LATEST, final.name)
        complete = _complete(self.folder)
        count = complete.index(final) + 1
        # a later one did not verify when this run resumed, and must neither count nor come back
        for path in complete[: max(count - self.keep, 0)] + complete[count:]:
            shutil.rmtree(path)

    def newest(self, last: int | None = None) -> Path | None:
        """The newest checkpoint that verifies; a damaged one is named on stderr and the one before it is taken.

        `latest` then names it too; but not where only those up to step `last` are asked for.
        """
        return self._world.share(lambda: self._newest(last))

    def _newest(self, last: int | None) -> Path | None:
        for path in reversed(_complete(self.folder)):
            if last is not None and _step(path) > last:
                continue
            try:
                verify(path)
            except CheckpointError as error:
                print(f"checkpoint set aside: {error}", file=sys.stderr, flush=True)
            else:
                if last is not None:
                    return path
                if not (latest := self.folder / LATEST).exists() or latest.read_text(encoding="utf-8") != path.name:
                    write_synced(latest, path.name)
                return path
        return None

    def load(self, path: Path, sharded: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(sharded state filled in, the run's own state) of a checkpoint, on all ranks together."""
        loaded = cast(dict[str, Any], dist_checkpointing.load(sharded, str(path)))
        return loaded, json.loads((path / STATE).read_text(encoding="utf-8"))


def name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step_{step:06d}"


def _complete(folder: Path) -> list[Path]:
    """Checkpoints that were renamed into place, oldest first."""
    numbered = [path for path in folder.glob("step_*") if path.is_dir() and path.name.removeprefix("step_").isdigit()]
    return sorted(numbered, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))
