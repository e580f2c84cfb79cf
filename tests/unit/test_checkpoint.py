"""Checkpoints: complete or absent, verified byte by byte, and older ones outlive whatever happens to a newer one."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_efr import checkpoint
from megatron_efr.checkpoint import LATEST, Checkpoints, name
from megatron_efr.config import CheckpointConfig
from megatron_efr.manifest import MANIFEST, STATE, CheckpointError, verify
from megatron_efr.policy.ranks import Ranks

STEP = {"step": 1, "method": {"mean": 0.1 + 0.2}, "stream": None}


def weights(value: float) -> dict[str, Any]:
    tensor = torch.full((300, 400), value)
    return {"weight": ShardedTensor.from_rank_offsets("weight", tensor), "common": {"lr": value}}


@pytest.fixture
def checkpoints(tmp_path: Path, ranks: Ranks) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep=2), ranks)


def held(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def latest(checkpoints: Checkpoints) -> str:
    return (checkpoints.folder / LATEST).read_text()


def fail(*_arguments: Any, **_named: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_was_saved_comes_back_and_only_the_newest_are_kept(checkpoints: Checkpoints) -> None:
    for step in (2, 4, 6, 8):
        assert checkpoints.save(step, weights(step / 3), STEP | {"step": step}) == checkpoints.folder / name(step)
        assert latest(checkpoints) == name(step)
    assert held(checkpoints) == [LATEST, name(6), name(8)]
    path = checkpoints.newest()
    assert path == checkpoints.folder / name(8)
    loaded, state = checkpoints.load(path, weights(0.0))
    assert torch.equal(loaded["weight"], torch.full((300, 400), 8 / 3))
    assert loaded["common"] == {"lr": 8 / 3}
    assert state == STEP | {"step": 8}


def test_numbers_are_compared_as_numbers(checkpoints: Checkpoints) -> None:
    for step in (999_999, 1_000_000):
        checkpoints.save(step, weights(step), STEP)
    assert checkpoints.newest() == checkpoints.folder / "step_1000000"


def damage_missing(file: Path) -> None:
    file.unlink()


def damage_truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def damage_flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def damage_unreadable(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, "missing"),
        (damage_truncated, "bytes, .* were written"),
        (damage_flipped, "its content is not what was written"),
        (damage_unreadable, "missing"),
    ],
)
def test_every_damaged_file_is_named_and_the_checkpoint_before_is_taken(
    checkpoints: Checkpoints, capfd: pytest.CaptureFixture[str], damage: Callable[[Path], None], message: str
) -> None:
    older, newer = (checkpoints.save(step, weights(step), STEP) for step in (2, 4))
    files = [path.name for path in sorted(newer.iterdir()) if path.name != MANIFEST]
    assert STATE in files
    assert any(file.endswith(".distcp") for file in files)
    whole = checkpoints.folder / "whole"
    shutil.copytree(newer, whole)
    for file in files:
        shutil.rmtree(newer)
        shutil.copytree(whole, newer)
        verify(newer)
        damage(newer / file)
        with pytest.raises(CheckpointError, match=rf"{newer / file}: .*{message}"):
            verify(newer)
        assert checkpoints.newest() == older
        assert f"checkpoint set aside: {newer / file}" in capfd.readouterr().err
        assert latest(checkpoints) == older.name


def test_any_bit_of_the_manifest_that_flips_is_noticed(checkpoints: Checkpoints) -> None:
    path = checkpoints.save(2, weights(1.0), STEP)
    manifest = path / MANIFEST
    whole = manifest.read_bytes()
    assert len(json.loads(whole)) == 5
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        manifest.write_bytes(data)
        with pytest.raises(CheckpointError, match=name(2)):
            verify(path)
    manifest.unlink()
    with pytest.raises(CheckpointError, match=r"no manifest\.json: the save was interrupted"):
        verify(path)


def test_a_folder_left_half_written_is_ignored_and_cleared_by_the_next_save(checkpoints: Checkpoints) -> None:
    older = checkpoints.save(2, weights(2.0), STEP)
    for left in (name(3), name(4)):
        shutil.copytree(older, older.with_name(f"{left}.partial"))
    assert checkpoints.newest() == older
    checkpoints.save(4, weights(4.0), STEP)
    assert held(checkpoints) == [LATEST, name(2), name(4)]


def test_without_a_whole_checkpoint_there_is_none(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest() is None
    only = checkpoints.save(2, weights(2.0), STEP)
    (only / STATE).unlink()
    assert checkpoints.newest() is None


def test_a_checkpoint_that_did_not_verify_neither_counts_nor_comes_back(tmp_path: Path, ranks: Ranks) -> None:
    """Resumed from step 2, since 4 was damaged, and saving at other steps now: 4 must not push out 2 or 3."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep=2), ranks)
    checkpoints.save(2, weights(2.0), STEP)
    damage_flipped(checkpoints.save(4, weights(4.0), STEP) / STATE)
    one = Checkpoints(checkpoints.folder, CheckpointConfig(keep=1), ranks)
    assert one.newest() == one.folder / name(2)
    one.save(3, weights(3.0), STEP)
    assert held(one) == [LATEST, name(3)]
    assert one.newest() == one.folder / name(3)


@pytest.mark.parametrize("call", ["rename", "replace", "fsync"])
def test_a_full_disk_leaves_the_older_checkpoints(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    older = checkpoints.save(2, weights(2.0), STEP)
    with monkeypatch.context() as failing:
        failing.setattr(os, call, fail)
        with pytest.raises(CheckpointError, match=rf"{name(4)}: cannot be written: .*No space left on device"):
            checkpoints.save(4, weights(4.0), STEP)
    assert latest(checkpoints) == older.name
    assert checkpoints.newest() == older
    assert checkpoints.load(older, weights(0.0))[0]["common"] == {"lr": 2.0}
    assert checkpoints.save(4, weights(4.0), STEP) == checkpoints.newest()
    assert held(checkpoints) == [LATEST, name(2), name(4)]


def test_a_file_that_cannot_be_written_whole_leaves_the_older_checkpoints(checkpoints: Checkpoints) -> None:
    """A real limit, within Megatron's own writing: no file of this process may grow beyond 100 kB."""
    older = checkpoints.save(2, weights(2.0), STEP)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=rf"{name(4)}: cannot be written: "):
            checkpoints.save(4, weights(4.0), STEP)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.newest() == older


def test_latest_moves_only_after_the_checkpoint_verified(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = checkpoints.save(2, weights(2.0), STEP)
    write = checkpoint.write_manifest

    def rots(folder: Path) -> None:
        write(folder)
        damage_flipped(folder / STATE)

    monkeypatch.setattr(checkpoint, "write_manifest", rots)
    with pytest.raises(CheckpointError, match=rf"{STATE}: its content is not what was written"):
        checkpoints.save(4, weights(4.0), STEP)
    assert latest(checkpoints) == older.name
    assert checkpoints.newest() == older
