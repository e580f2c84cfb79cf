"""Checkpoints: Megatron's sharded state and the run's own, complete or absent, verified before
`latest` moves.
"""

from __future__ import annotations

import logging

import megatron_efr.transformer_engine  # noqa: F401 - before Megatron

# isort: split
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, Protocol, cast

import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_efr import log
from megatron_efr.checkpoint.manifest import (
    LATEST,
    STATE,
    CheckpointError,
    verify,
    write_manifest,
)
from megatron_efr.checkpoint.shards import UNWRITTEN, Shards, check_readable
from megatron_efr.config import CheckpointConfig
from megatron_efr.durable import reason, remove_torn_writes, replace_file, sync_folder, writing


class World(Protocol):
    """The ranks, as far as saving needs them."""

    @property
    def is_main(self) -> bool: ...

    @property
    def cpu_world(self) -> dist.ProcessGroup: ...

    def share(self, make: Callable[[], Any]) -> Any: ...

    def everywhere(self, holds: bool) -> bool: ...


class Checkpoints:
    """The checkpoints of one run folder: `step_000010/` each, and `latest`, which names the newest
    that verified.

    A checkpoint is Megatron's distributed format beside `state.json` (the run's own state) and
    `manifest.json` (size and SHA-256 of every file). Written beside its place and renamed: a kill
    at any moment leaves the older ones.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, world: World) -> None:
        self.folder = folder
        self._config = config
        self._world = world
        self._thread = futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: Iterator[futures.Future[Any]] | None = None  # what remains of a save
        self._pending: futures.Future[Any] | None = None  # the part of it that the thread does

    def save(
        self,
        step: int,
        sharded: dict[str, Any],
        state: dict[str, Any],
        then: Callable[[], None] | None = None,
    ) -> Path:
        """Save on all ranks together, verify, move `latest`, call `then` on rank 0, drop what is
        not to be kept.

        If `checkpoint.background` is set it returns once tensors are copied to host memory, and the
        rest happens while training goes on: call `settle` now and then, and before the end.
        CheckpointError if a file cannot be written: it names the file, and comes from here or from
        a later `settle`, on every rank.
        """
        self.settle(wait=True)
        self._saving = self._save(step, sharded, state, then or (lambda: None))
        self._advance()
        self.settle(wait=not self._config.background)
        return self.folder / name(step)

    def settle(self, *, wait: bool = False) -> None:
        """Take a save that goes on in the background as far as it goes without waiting, or to its
        end.

        All ranks together; nothing if none goes on.
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
        """The save, in order; it stops at each part that a thread does. Only between these do the
        ranks meet.
        """
        final = self.folder / name(step)
        partial = final.with_name(final.name + ".partial")
        try:
            self._world.share(lambda: self._begin(partial))
            shards = Shards(self._world.cpu_world, copied=self._config.background)
            request: Any = dist_checkpointing.save(
                sharded, str(partial), shards, async_sharded_save=True
            )
            yield self._thread.submit(request.async_fn)
            for finalize in request.finalize_fns:
                finalize()
            finished = self._thread.submit(
                lambda: self._world.is_main and self._finish(partial, final, state)
            )
            yield finished
            self._world.share(finished.result)
            self._world.share(then)
        except UNWRITTEN as error:
            raise CheckpointError(
                f"{final}: cannot be written: {reason(final, error)}; the checkpoints before it "
                "are untouched"
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
        replace_file(self.folder / LATEST, final.name)
        log.event("saved", f"{final} verifies", logging.DEBUG)
        self._drop_superseded(final)

    def _drop_superseded(self, newest: Path) -> None:
        """Remove the checkpoints that are not to be kept, now that `newest` is there and `latest`
        names it.
        """
        complete = _complete(self.folder)
        count = complete.index(newest) + 1
        every = self._config.keep_every
        for path in complete[: max(count - self._config.keep, 0)]:
            if every is None or _step(path) % every:
                shutil.rmtree(path)

    def newest(self, last: int | None = None) -> Path | None:
        """The newest checkpoint that verifies, or None if none was ever saved.

        Damaged ones are named on stderr and set aside: renamed, so that they neither count nor are
        overwritten, and can come back. `latest` then names the one that is taken, and what is not
        to be kept goes. If those up to step `last` are asked for, nothing is changed.
        CheckpointError if there are some and all are damaged: it names every fault, and nothing is
        changed; or if the one to take is for a newer Megatron-Core.
        """
        return self._world.share(lambda: self._newest(last))

    def _newest(self, last: int | None) -> Path | None:
        damaged: dict[Path, CheckpointError] = {}
        # the newest first; those that do not verify are remembered until one does
        for path in reversed(_complete(self.folder)):
            if last is not None and _step(path) > last:
                continue
            try:
                verify(path)
            except CheckpointError as error:
                damaged[path] = error
                continue
            # refused before anything is renamed: a whole one may be for a newer Megatron-Core
            check_readable(path)
            # this one counts: what is newer and damaged is set aside, what is older may go
            for other, error in damaged.items():
                log.warning(f"checkpoint set aside: {error}")
                if last is None:
                    _set_aside(other)
            if last is None:
                with writing(self.folder):
                    self._settle_on(path)
            return path
        # nothing verifies: a run that was saved before must not begin again unasked
        latest = self.folder / LATEST
        if damaged or (last is None and latest.exists()):
            faults = list(map(str, damaged.values())) or [
                f"{latest}: names a checkpoint, and none is there"
            ]
            raise CheckpointError(
                (
                    f"{self.folder}: no checkpoint verifies, and this run has been saved before; "
                    "nothing was changed\n"
                )
                + "".join(f"  {fault}\n" for fault in faults)
                + "put a copy of one of them back; or start over under another name (name=...)"
            )
        return None

    def _settle_on(self, path: Path) -> None:
        """Make `path` the latest, and finish what a kill after it was saved left to do."""
        latest = self.folder / LATEST
        if not latest.exists() or latest.read_text(encoding="utf-8") != path.name:
            replace_file(latest, path.name)
        remove_torn_writes(self.folder)
        self._drop_superseded(path)

    def load(self, path: Path, sharded: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(sharded state filled in, the run's own state) of a checkpoint, on all ranks together."""
        check_readable(path)
        loaded = cast(dict[str, Any], dist_checkpointing.load(sharded, str(path)))
        return loaded, json.loads((path / STATE).read_text(encoding="utf-8"))


def name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step_{step:06d}"


def _set_aside(path: Path) -> None:
    """Rename a damaged checkpoint to `step_000010.damaged`, or with a number if there is one
    already.
    """
    names = (
        f"{path.name}.damaged{end}" for end in ("", *(f"-{number}" for number in range(2, 1000)))
    )
    with writing(path.parent):
        place = next(place for each in names if not (place := path.with_name(each)).exists())
        os.rename(path, place)
    log.warning(f"  it is {place} now, and nothing reads it there")


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _complete(folder: Path) -> list[Path]:
    """Checkpoints that were renamed into place, oldest first."""
    numbered = [
        path
        for path in folder.glob("step_*")
        if path.is_dir() and path.name.removeprefix("step_").isdigit()
    ]
    return sorted(numbered, key=_step)
