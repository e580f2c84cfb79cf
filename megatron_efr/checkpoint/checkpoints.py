"""Checkpoints: Megatron's sharded state and the run's own, complete or absent, verified before `latest` moves."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, Protocol, cast

import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_efr.checkpoint.manifest import (
    LATEST,
    STATE,
    CheckpointError,
    sync_folder,
    verify,
    write_manifest,
    write_synced,
)
from megatron_efr.checkpoint.shards import UNWRITTEN, Shards
from megatron_efr.config import CheckpointConfig


class World(Protocol):
    """What saving needs of the ranks."""

    @property
    def is_main(self) -> bool: ...

    @property
    def cpu_world(self) -> dist.ProcessGroup: ...

    def share(self, make: Callable[[], Any]) -> Any: ...

    def everywhere(self, holds: bool) -> bool: ...


class Checkpoints:
    """The checkpoints of one run folder: `step_000010/` each, and `latest`, which names the newest that verified.

    A checkpoint is Megatron's distributed format beside `state.json` (the run's own state) and `manifest.json` (size
    and SHA-256 of every file). Written beside its place and renamed: a kill at any moment leaves the older ones.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, world: World) -> None:
        self.folder, self._config, self._world = folder, config, world
        self._thread = futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: Iterator[futures.Future[Any]] | None = None  # what remains of a save
        self._pending: futures.Future[Any] | None = None  # the part of it that the thread does

    def save(
        self, step: int, sharded: dict[str, Any], state: dict[str, Any], then: Callable[[], None] | None = None
    ) -> Path:
        """Save on all ranks together, verify, move `latest`, call `then` on rank 0, drop what is not to be kept.

        Where `checkpoint.background` is set it returns once tensors are copied to host memory, and the rest happens
        while training goes on: call `settle` now and then, and before the end. CheckpointError where a file cannot be
        written: it names the file, and comes from here or from a later `settle`, on every rank.
        """
        self.settle(wait=True)
        self._saving = self._save(step, sharded, state, then or (lambda: None))
        self._advance()
        self.settle(wait=not self._config.background)
        return self.folder / name(step)

    def settle(self, *, wait: bool = False) -> None:
        """Take a save that goes on in the background as far as it goes without waiting, or to its end.

        All ranks together; nothing where none goes on.
        """
        while self._pending is not None and (wait or self._world.everywhere(self._pending.done())):
            self._advance()

    def _advance(self) -> None:
        """Wait for the thread's part of the save, and go on to its next."""
        if self._pending is not None:
            futures.wait([self._pending])
        self._pending, saving = None, cast(Iterator[futures.Future[Any]], self._saving)
        self._pending = next(saving, None)

    def _save(
        self, step: int, sharded: dict[str, Any], state: dict[str, Any], then: Callable[[], None]
    ) -> Iterator[futures.Future[Any]]:
        """The save, in order; it stops at each part that a thread does. Only between these do the ranks meet."""
        final = self.folder / name(step)
        partial = final.with_name(final.name + ".partial")
        try:
            self._world.share(lambda: self._begin(partial))
            shards = Shards(self._world.cpu_world, copied=self._config.background)
            request: Any = dist_checkpointing.save(sharded, str(partial), shards, async_sharded_save=True)
            yield self._thread.submit(request.async_fn)
            for finalize in request.finalize_fns:
                finalize()
            finished = self._thread.submit(lambda: self._world.is_main and self._finish(partial, final, state))
            yield finished
            self._world.share(finished.result)
            self._world.share(then)
        except UNWRITTEN as error:
            raise CheckpointError(
                f"{final}: cannot be written: {error}; {shutil.disk_usage(self.folder).free:,} bytes are free there; "
                f"the checkpoints before it are untouched, and --resume goes on from the newest"
            ) from error

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
        for path in self._superseded(final):
            shutil.rmtree(path)

    def _superseded(self, newest: Path) -> Iterator[Path]:
        """The checkpoints that are not to be kept, now that `newest` is there."""
        complete = _complete(self.folder)
        count, every = complete.index(newest) + 1, self._config.keep_every
        for path in complete[: max(count - self._config.keep, 0)]:
            if every is None or _step(path) % every:
                yield path
        # a later one did not verify when this run resumed, and must neither count nor come back
        yield from complete[count:]

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


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _complete(folder: Path) -> list[Path]:
    """Checkpoints that were renamed into place, oldest first."""
    numbered = [path for path in folder.glob("step_*") if path.is_dir() and path.name.removeprefix("step_").isdigit()]
    return sorted(numbered, key=_step)
