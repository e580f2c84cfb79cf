"""Whatever a run writes: if the disk does not take it there is a sentence, and the old content is
still there.
"""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_efr.config import LoraConfig, ObserveConfig
from megatron_efr.durable import (
    UnwritableError,
    append_line,
    remove_torn_writes,
    standing,
    whole_folder,
    writing,
)
from megatron_efr.errors import EngineError
from megatron_efr.evaluation.journal import Unfinished
from megatron_efr.observe import Observer
from megatron_efr.publication.reshard import Parcel
from megatron_efr.publication.transports import Disk
from megatron_efr.run.folder import RunFolder
from megatron_efr.weights.folder import save_folder
from megatron_efr.weights.lora import save_adapter
from tests.groups import credited, graded

GROUP = credited(graded([True], [2]), [0.5])
CONFIG = "name: a\nseed: 1\n"


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond ten bytes: a part of what is written arrives, as on a disk that fills
    up.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


WRITES: dict[str, tuple[str, Callable[[RunFolder], Any]]] = {
    "claim": ("config.yaml", lambda folder: folder.claim(CONFIG, resume=True)),
    "append_metrics": ("metrics.jsonl", lambda folder: folder.append_metrics(3, {"accuracy": 0.5})),
    "truncate_metrics": ("metrics.jsonl", lambda folder: folder.truncate_metrics(1)),
    "journal": ("journal/step_000003.jsonl", lambda folder: folder.journal(3).append(GROUP.group)),
    "rollouts": (
        "rollouts/step_000001.jsonl.zst",
        lambda folder: folder.write_rollouts(1, [GROUP, GROUP]),
    ),
    "evaluation": (
        "eval/model.json",
        lambda folder: folder.write_evaluation("model", {"name": "another"}),
    ),
    "summary": ("summary.json", lambda folder: folder.write_summary({"models": ["another"]})),
    "unfinished": (
        "eval/unfinished/m.json",
        lambda folder: Unfinished(folder.evaluations / "m.json", {"seed": 12345}),
    ),
}


def contents(folder: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.stat().st_size
    }


@pytest.mark.parametrize("name", WRITES)
def test_what_a_full_disk_takes_a_part_of_is_taken_back_and_the_old_is_still_there(
    tmp_path: Path, name: str
) -> None:
    folder = RunFolder(tmp_path)
    folder.claim(CONFIG)
    for step in (1, 2):
        folder.append_metrics(step, {"accuracy": 0.25})
    folder.write_rollouts(1, [GROUP])
    folder.write_evaluation("model", {"name": "model"})
    folder.write_summary({"models": []})
    before = contents(tmp_path)
    file, write = WRITES[name]
    with full_disk(), pytest.raises(UnwritableError) as refused:
        write(folder)
    said = str(refused.value)
    assert said.startswith(f"{tmp_path / file}: cannot be written: File too large; ")
    assert f" bytes are free at {(tmp_path / file).parent}; what was " in said
    assert contents(tmp_path) == before
    write(folder)
    assert contents(tmp_path) != before or name == "claim"


def test_a_model_folder_is_complete_or_absent(tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.mkdir()
    (template / "config.json").write_text("{}")
    tensors = {"weight": torch.zeros(100)}
    with (
        full_disk(),
        pytest.raises(UnwritableError, match=r"model: cannot be written: .*File too large"),
    ):
        save_folder(tmp_path / "model", tensors.items(), template)
    assert not (tmp_path / "model").exists()
    save_folder(tmp_path / "model", tensors.items(), template)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_folder_that_is_there_stands_until_the_new_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "model"
    with whole_folder(place) as partial:
        (partial / "a").write_text("1")
    move = os.replace

    def busy(source: Path, target: Path) -> None:
        if Path(source).suffix == ".partial":
            raise OSError(errno.EBUSY, "Device or resource busy")
        move(source, target)

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(UnwritableError, match="busy"), whole_folder(place) as partial:
        (partial / "a").write_text("2")
    assert [path.read_text() for path in tmp_path.rglob("a")] == ["1"]
    monkeypatch.undo()
    with whole_folder(place) as partial:
        (partial / "a").write_text("2")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["model", "model/a"]


def test_a_folder_whose_writer_was_killed_between_its_moves_comes_back(tmp_path: Path) -> None:
    place = tmp_path / "model"
    with whole_folder(place) as partial:
        (partial / "a").write_text("1")
    place.rename(tmp_path / "model.old")
    with pytest.raises(UnwritableError), whole_folder(place):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (place / "a").read_text() == "1"


def test_an_adapter_is_complete_or_absent_and_the_last_one_is_kept(tmp_path: Path) -> None:
    lora = LoraConfig(rank=2, alpha=4.0)
    save_adapter(tmp_path / "adapter", {"a": torch.zeros(100)}, lora, "model")
    before = contents(tmp_path)
    with (
        full_disk(),
        pytest.raises(UnwritableError, match=r"adapter: cannot be written: .*File too large"),
    ):
        save_adapter(tmp_path / "adapter", {"a": torch.ones(100)}, lora, "model")
    assert contents(tmp_path) == before
    save_adapter(tmp_path / "adapter", {"a": torch.ones(100)}, lora, "model")
    assert load_file(tmp_path / "adapter/adapter_model.safetensors")["a"].sum() == 100
    assert len(contents(tmp_path)) == 2


# Rust's words of a full disk, and Python's
@pytest.mark.parametrize("step", ["begin", "deliver"])
def test_a_full_shared_disk_is_the_engines_error_which_every_rank_hears(
    step: str, tmp_path: Path
) -> None:
    template, shared = tmp_path / "template", tmp_path / "shared"
    template.mkdir()
    (template / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    disk, parcel = Disk(None, shared, template), Parcel([("a", torch.ones(100))], None)
    if step == "deliver":
        disk.begin()
    with (
        full_disk(),
        pytest.raises(EngineError, match=rf"^{shared}: cannot be written: .*File too large.*free"),
    ):
        disk.begin() if step == "begin" else disk.deliver(parcel)
    disk.begin()  # tried again, with room
    disk.deliver(parcel)
    assert load_file(shared / "model-00001.safetensors")["a"].sum() == 100


# its thread says so too
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboards_files_too(tmp_path: Path) -> None:
    observer = Observer(RunFolder(tmp_path), ObserveConfig(), total_steps=2)
    with pytest.raises(
        UnwritableError, match=r"(metrics\.jsonl|tensorboard): cannot be written: File too large"
    ):
        with full_disk(), observer:
            observer._outputs[0].log(1, {"loss": 0.5}, 1.0)


def test_of_a_folder_the_file_that_was_refused_is_named(tmp_path: Path) -> None:
    (tmp_path / "report" / "family.png").mkdir(parents=True)
    for refused, named in (("report/family.png", "report/family.png"), (".", "report")):
        said = rf"^{tmp_path / named}: cannot be written: Is a directory; "
        with pytest.raises(UnwritableError, match=said), writing(tmp_path / "report"):
            open(tmp_path / refused, "w").close()


def test_a_folder_that_cannot_be_made_is_named_with_the_one_above_that_is_there(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UnwritableError, match=rf"file/a/b: cannot be written: .* bytes are free at {tmp_path};"
    ):
        append_line(tmp_path / "file/a/b", b"x")
    assert standing(tmp_path / "a" / "b") == tmp_path


@pytest.mark.skipif(
    os.geteuid() == 0 and not os.path.isdir("/sys"),
    reason="needs a folder that nobody may write to",
)
def test_a_read_only_place_is_a_sentence() -> None:
    with pytest.raises(
        UnwritableError, match=r"/sys/megatron_efr/config\.yaml: cannot be written: "
    ):
        RunFolder("/sys/megatron_efr").claim(CONFIG)


def test_a_line_is_added_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for line in (b"one", b"two"):
        append_line(path, line)
    with full_disk(), pytest.raises(UnwritableError):
        append_line(path, b"three")
    append_line(path, b"four")
    assert path.read_bytes() == b"one\ntwo\nfour\n"
    (tmp_path / ".a.1.tmp").write_text("")
    remove_torn_writes(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
