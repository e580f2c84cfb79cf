"""Checkpoints: complete or absent, verified byte by byte, and older ones outlive whatever happens
to a newer one.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint import FileSystemWriter

from megatron_efr.checkpoint import checkpoints as saving
from megatron_efr.checkpoint.checkpoints import LATEST, Checkpoints, name
from megatron_efr.checkpoint.manifest import MANIFEST, STATE, CheckpointError, verify
from megatron_efr.config import CheckpointConfig
from megatron_efr.policy.ranks import Ranks

STEP = {"step": 1, "method": {"mean": 0.1 + 0.2}, "stream": None}


def weights(value: float) -> dict[str, Any]:
    tensor = torch.full((300, 400), value)
    return {"weight": ShardedTensor.from_rank_offsets("weight", tensor), "common": {"lr": value}}


@pytest.fixture(params=[False, True], ids=["at once", "in the background"])
def checkpoints(tmp_path: Path, ranks: Ranks, request: pytest.FixtureRequest) -> Checkpoints:
    return Checkpoints(
        tmp_path / "checkpoints", CheckpointConfig(keep=2, background=request.param), ranks
    )


def save(checkpoints: Checkpoints, step: int, sharded: dict[str, Any] | None = None) -> Path:
    """Save to the end."""
    path = checkpoints.save(step, sharded or weights(float(step)), STEP | {"step": step})
    checkpoints.settle(wait=True)
    return path


def held(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def latest(checkpoints: Checkpoints) -> str:
    return (checkpoints.folder / LATEST).read_text()


def fail(*_arguments: Any, **_named: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_was_saved_comes_back_and_only_the_newest_are_kept(checkpoints: Checkpoints) -> None:
    for step in (2, 4, 6, 8):
        assert save(checkpoints, step, weights(step / 3)) == checkpoints.folder / name(step)
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
        save(checkpoints, step)
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
    checkpoints: Checkpoints,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    message: str,
) -> None:
    older, newer = (save(checkpoints, step) for step in (2, 4))
    files = [path.name for path in sorted(newer.iterdir()) if path.name != MANIFEST]
    assert STATE in files
    assert any(file.endswith(".distcp") for file in files)
    whole = checkpoints.folder / "whole"
    shutil.copytree(newer, whole)
    for number, file in enumerate(files, start=1):
        shutil.copytree(whole, newer, dirs_exist_ok=True)
        verify(newer)
        damage(newer / file)
        with pytest.raises(CheckpointError, match=rf"{newer / file}: .*{message}"):
            verify(newer)
        damaged = {path.name: path.read_bytes() for path in newer.iterdir() if path.is_file()}
        assert checkpoints.newest(last=4) == older
        assert latest(checkpoints) == newer.name, "nothing is changed where a replay asks"
        assert checkpoints.newest() == older
        aside = newer.with_name(f"{newer.name}.damaged" + (f"-{number}" if number > 1 else ""))
        said = capfd.readouterr().err
        assert f"checkpoint set aside: {newer / file}" in said
        assert f"it is {aside} now" in said
        assert {
            path.name: path.read_bytes() for path in aside.iterdir() if path.is_file()
        } == damaged
        assert latest(checkpoints) == older.name
        checkpoints.folder.joinpath(LATEST).write_text(newer.name)


def test_any_bit_of_the_manifest_that_flips_is_noticed(checkpoints: Checkpoints) -> None:
    path = save(checkpoints, 2)
    manifest = path / MANIFEST
    whole = manifest.read_bytes()
    assert json.loads(whole).keys() == {path.name for path in path.iterdir()} - {MANIFEST}
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        manifest.write_bytes(data)
        with pytest.raises(CheckpointError, match=name(2)):
            verify(path)
    manifest.unlink()
    with pytest.raises(CheckpointError, match=r"no manifest\.json: the save was interrupted"):
        verify(path)


def test_a_folder_left_half_written_is_ignored_and_cleared_by_the_next_save(
    checkpoints: Checkpoints,
) -> None:
    older = save(checkpoints, 2)
    for left in (name(3), name(4)):
        shutil.copytree(older, older.with_name(f"{left}.partial"))
    assert checkpoints.newest() == older
    save(checkpoints, 4)
    assert held(checkpoints) == [LATEST, name(2), name(4)]


def contents(checkpoints: Checkpoints) -> dict[str, bytes]:
    files = (path for path in checkpoints.folder.rglob("*") if path.is_file())
    return {str(path.relative_to(checkpoints.folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("damage", [damage_missing, damage_truncated, damage_flipped])
def test_where_no_checkpoint_verifies_every_fault_is_named_and_nothing_is_changed(
    checkpoints: Checkpoints, damage: Callable[[Path], None]
) -> None:
    assert checkpoints.newest() is None
    faults = [save(checkpoints, step) / STATE for step in (2, 4)]
    for file in faults:
        damage(file)
    before = contents(checkpoints)
    for last in (None, 4):
        with pytest.raises(CheckpointError, match="no checkpoint verifies") as refused:
            checkpoints.newest(last)
        assert all(f"  {file}: " in str(refused.value) for file in faults)
        assert contents(checkpoints) == before


def test_where_all_checkpoints_are_gone_and_latest_names_one_it_does_not_start_over(
    checkpoints: Checkpoints,
) -> None:
    shutil.rmtree(save(checkpoints, 2))
    with pytest.raises(CheckpointError, match=r"latest: names a checkpoint, and none is there"):
        checkpoints.newest()
    assert checkpoints.newest(last=1) is None


def test_a_kill_between_latest_and_the_removal_of_older_ones_is_made_up_for(
    tmp_path: Path, ranks: Ranks
) -> None:
    many = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep=5), ranks)
    for step in (2, 4, 6, 8):
        save(many, step)
    few = Checkpoints(many.folder, CheckpointConfig(keep=2), ranks)
    assert few.newest(last=8) == few.folder / name(8)
    assert held(few) == [LATEST, *map(name, (2, 4, 6, 8))]
    assert few.newest() == few.folder / name(8)
    assert held(few) == [LATEST, name(6), name(8)]


def test_a_checkpoint_that_did_not_verify_neither_counts_nor_is_lost(
    tmp_path: Path, ranks: Ranks
) -> None:
    """Resumed from step 2, since 4 was damaged, and saving at other steps now: 4 must not push out
    2 or 3.
    """
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep=2), ranks)
    save(checkpoints, 2)
    damage_flipped(save(checkpoints, 4) / STATE)
    one = Checkpoints(checkpoints.folder, CheckpointConfig(keep=1), ranks)
    assert one.newest() == one.folder / name(2)
    save(one, 3)
    assert held(one) == [LATEST, name(3), f"{name(4)}.damaged"]
    assert one.newest() == one.folder / name(3)
    save(one, 4)
    assert held(one) == [LATEST, name(4), f"{name(4)}.damaged"]


@pytest.mark.parametrize("call", ["rename", "replace", "fsync"])
def test_a_full_disk_leaves_the_older_checkpoints(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    older = save(checkpoints, 2)
    with monkeypatch.context() as failing:
        failing.setattr(os, call, fail)
        with pytest.raises(
            CheckpointError, match=rf"{name(4)}: cannot be written: .*No space left on device"
        ):
            save(checkpoints, 4)
    assert latest(checkpoints) == older.name
    assert checkpoints.newest() == older
    assert checkpoints.load(older, weights(0.0))[0]["common"] == {"lr": 2.0}
    assert save(checkpoints, 4) == checkpoints.newest()
    assert held(checkpoints) == [LATEST, name(2), name(4)]


def test_a_file_that_cannot_be_written_whole_leaves_the_older_checkpoints(
    checkpoints: Checkpoints,
) -> None:
    """A real limit, within Megatron's own writing: no file of this process may grow beyond 100
    kB.
    """
    older = save(checkpoints, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=rf"{name(4)}: cannot be written: "):
            save(checkpoints, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.newest() == older


def test_latest_moves_only_after_the_checkpoint_verified(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = save(checkpoints, 2)
    write = saving.write_manifest

    def rots(folder: Path) -> None:
        write(folder)
        damage_flipped(folder / STATE)

    monkeypatch.setattr(saving, "write_manifest", rots)
    with pytest.raises(CheckpointError, match=rf"{STATE}: its content is not what was written"):
        save(checkpoints, 4)
    assert latest(checkpoints) == older.name
    assert checkpoints.newest() == older


def test_every_so_many_are_kept_for_good(tmp_path: Path, ranks: Ranks) -> None:
    checkpoints = Checkpoints(
        tmp_path / "checkpoints", CheckpointConfig(every=2, keep=2, keep_every=6), ranks
    )
    for step in (2, 4, 6, 8, 10, 12, 14, 16):
        save(checkpoints, step)
    assert held(checkpoints) == [LATEST, name(6), name(12), name(14), name(16)]
    with pytest.raises(ValueError, match="keep_every 15 is no multiple of every 10"):
        CheckpointConfig(every=10, keep_every=15)


def test_training_goes_on_while_the_background_writes_what_was_saved(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(background=True), ranks)
    older = save(checkpoints, 2)
    may_write, write = threading.Event(), FileSystemWriter.write_data

    def waits(self: FileSystemWriter, *arguments: Any) -> Any:
        assert may_write.wait(60)
        return write(self, *arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", waits)
    sharded, called = weights(4.0), []
    checkpoints.save(4, sharded, STEP, then=lambda: called.append(4))
    sharded["weight"].data.fill_(5.0)  # the next update
    checkpoints.settle()
    assert latest(checkpoints) == older.name
    assert checkpoints.newest() == older
    assert not called
    may_write.set()
    checkpoints.settle(wait=True)
    assert latest(checkpoints) == name(4)
    assert called == [4]
    loaded, _ = checkpoints.load(checkpoints.folder / name(4), weights(0.0))
    assert torch.equal(loaded["weight"], torch.full((300, 400), 4.0))


def test_a_later_save_waits_for_the_one_in_the_background(tmp_path: Path, ranks: Ranks) -> None:
    checkpoints = Checkpoints(
        tmp_path / "checkpoints", CheckpointConfig(background=True, keep=3), ranks
    )
    for step in (2, 4, 6):
        checkpoints.save(step, weights(float(step)), STEP)
        assert step == 2 or latest(checkpoints) in (name(step - 2), name(step))
    checkpoints.settle(wait=True)
    assert held(checkpoints) == [LATEST, name(2), name(4), name(6)]


def test_both_ways_write_the_same_bytes(tmp_path: Path, ranks: Ranks) -> None:
    """All but the identity that torch draws for each checkpoint, in its metadata."""
    paths = [
        save(Checkpoints(tmp_path / str(way), CheckpointConfig(background=way), ranks), 2)
        for way in (False, True)
    ]
    data = [path.name for path in paths[0].iterdir() if path.name not in (".metadata", MANIFEST)]
    assert {"__0_0.distcp", STATE} <= set(data)
    for file in data:
        assert (paths[0] / file).read_bytes() == (paths[1] / file).read_bytes(), file


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_fills_up_anywhere_in_a_save_leaves_the_older_checkpoints(
    small_disk: Path, ranks: Ranks, background: bool
) -> None:
    """A checkpoint takes 500 kB: with less left, one or another of its files cannot be written."""
    checkpoints = Checkpoints(
        small_disk / "checkpoints", CheckpointConfig(background=background), ranks
    )
    older = save(checkpoints, 2)
    for left in (0, 8_000, 16_000, 100_000, 480_000, 488_000, 492_000):
        shutil.rmtree(checkpoints.folder / f"{name(4)}.partial", ignore_errors=True)
        (small_disk / "filling").write_bytes(
            bytes(max(shutil.disk_usage(small_disk).free - left, 0))
        )
        with pytest.raises(
            CheckpointError, match=rf"{name(4)}: cannot be written: .* bytes are free at"
        ):
            save(checkpoints, 4)
        assert checkpoints.newest() == older
        assert latest(checkpoints) == older.name
        (small_disk / "filling").unlink()
    assert save(checkpoints, 4) == checkpoints.newest()
