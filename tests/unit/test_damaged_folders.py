"""Run folders and checkpoints that are empty, another program's, or damaged: a sentence names the
file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_efr import arguments, inspect_checkpoint
from megatron_efr.checkpoint.model_source import find_model
from megatron_efr.config import ModelConfig
from megatron_efr.errors import UserError
from megatron_efr.evaluation.records import summarise
from megatron_efr.evaluation.stored import read_evaluation
from megatron_efr.report.__main__ import main as report
from megatron_efr.report.stored import read_summary
from megatron_efr.run.folder import RunFolder, read_rollouts
from megatron_efr.types import Credited, Prompt
from tests.groups import credited, graded

Ended = Callable[..., str]


def group() -> Credited:
    prompt = Prompt("d/1", (1, 2), "2+2", "4", {"dataset": "d", "difficulty": 1})
    return credited(graded([True], [2], text="4", prompt=prompt), [0.5])


@pytest.fixture
def ended(capsys: pytest.CaptureFixture[str]) -> Ended:
    """The message of a program that ends with code 2."""

    def run(program: Callable[[Sequence[str] | None], None], *arguments_: object) -> str:
        with pytest.raises(SystemExit) as end:
            arguments.run(program, [str(argument) for argument in arguments_])
        assert end.value.code == 2
        return capsys.readouterr().err

    return run


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run with two iterations, an evaluation and a summary."""
    made = RunFolder(tmp_path / "run")
    made.path.mkdir()
    made.config.write_text("name: run\n")
    for step in (1, 2):
        made.append_metrics(step, {"accuracy": 0.5})
    made.write_evaluation("base", summarise([group().graded], "base"))
    return made


def test_what_is_no_run_folder_gets_no_report(tmp_path: Path, ended: Ended) -> None:
    assert f"{tmp_path / 'absent'}: no such run folder" in ended(report, tmp_path / "absent")
    assert f"{tmp_path}: no run's folder: none of config.yaml" in ended(report, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert f"{tmp_path}: no run's folder" in ended(report, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"], (
        "a report was written into it"
    )


def test_a_whole_run_and_one_with_half_a_last_line_get_theirs(folder: RunFolder) -> None:
    report([str(folder.path)])
    with folder.metrics.open("ab") as file:
        file.write(b'{"step": 3, "acc')
    folder.config.write_bytes(b"name: \xff\n")  # only shown
    report([str(folder.path)])
    assert (folder.report / "index.html").is_file()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged, not JSON"),
        (b"{", "damaged, not JSON"),
        (b"\xff\xfe", "damaged, not JSON"),
        (b"[" * 5000, "damaged, not JSON"),
        (b"[]", "no evaluation record: an object belongs here"),
        (b"{}", "no evaluation record: problems: Field required"),
        (b'{"problems": "3"}', "no evaluation record: problems: Input should be a valid integer"),
        (b'{"accuracy": NaN}', "no evaluation record: problems: Field required"),
    ],
)
def test_an_evaluation_that_is_none_is_named(
    content: bytes, words: str, folder: RunFolder, ended: Ended
) -> None:
    path = folder.evaluations / "base.json"
    path.write_bytes(content)
    message = ended(report, folder.path)
    assert f"error: {path}: {words}" in message
    assert "; move it out of this folder, or evaluate again" in message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"step": 2, "acc\n', ":3: damaged: no line of metrics"),
        (b"half\n", ":3: damaged: no line of metrics"),
        (b"[1]\n", ":3: damaged: no line of metrics"),
        (b'{"step": "3"}\n', ":3: damaged: no line of metrics"),
        (b"\xff\n", ":3: damaged: no line of metrics"),
    ],
)
def test_a_damaged_line_of_metrics_is_named(
    line: bytes, words: str, folder: RunFolder, ended: Ended
) -> None:
    with folder.metrics.open("ab") as file:
        file.write(line + b'{"step": 4}\n')
    assert f"error: {folder.metrics}{words}" in ended(report, folder.path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"models": 3}', b'{"models": [{}], "seconds": {}}', b"\xff"]
)
def test_a_summary_that_is_none_is_named(content: bytes, folder: RunFolder, ended: Ended) -> None:
    folder.summary.write_bytes(content)
    for more in ([], ["--against", str(folder.path)]):
        assert f"error: {folder.summary}: " in ended(report, folder.path, *more)
    (folder.path / "seed-1").mkdir()
    (folder.path / "seed-1/summary.json").write_bytes(content)
    assert f"error: {folder.path / 'seed-1/summary.json'}: " in ended(
        report, folder.path, "--seeds"
    )


@pytest.mark.parametrize(
    ("key", "value", "where"),
    [
        ("label", 3, "models.0.label"),
        ("base", None, "models.0.base"),
        ("runs", [3], "models.0.runs.0"),
        ("problems", "9", "models.0.problems"),
        ("left_out", {"d": "1"}, "models.0.left_out.d"),
        ("accuracy_by_seed", ["0.5"], "models.0.accuracy_by_seed.0"),
        ("tokens_by_seed", 9.0, "models.0.tokens_by_seed"),
        ("accuracy_sd", "0.1", "models.0.accuracy_sd"),
        ("tokens_sd", [], "models.0.tokens_sd"),
        ("seeds", "2", "seeds"),
        ("against", 1, "against"),
    ],
)
def test_a_key_of_a_summary_that_is_of_another_kind_is_named(
    key: str, value: object, where: str, tmp_path: Path
) -> None:
    model = {
        "name": "m",
        "alpha": None,
        "accuracy": 0.5,
        "tokens": 9.0,
        "tokens_by_difficulty": {},
    }
    tree: dict[str, Any] = {"models": [model], "seconds": {}}
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(tree))
    assert read_summary(path) == tree
    (model if where.startswith("models") else tree)[key] = value
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=rf"summary\.json: no family's summary: {where}: "):
        read_summary(path)


def test_families_of_other_models_are_not_put_together(folder: RunFolder, ended: Ended) -> None:
    for seed, alpha in (("seed-1", 0.1), ("seed-2", 0.2)):
        model = {
            "name": "m",
            "alpha": alpha,
            "accuracy": 0.5,
            "tokens": 9.0,
            "tokens_by_difficulty": {},
        }
        RunFolder(folder.path / seed).write_summary({"models": [model], "seconds": {}})
    assert ("seeds can be put together only for one family of models") in ended(
        report, folder.path, "--seeds"
    )


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_what_is_no_checkpoint_is_said_to_be_none(name: str, tmp_path: Path, ended: Ended) -> None:
    (tmp_path / "empty").mkdir()
    assert f"error: {tmp_path / name}: no checkpoint: no .metadata there" in ended(
        inspect_checkpoint.main, tmp_path / name
    )


@pytest.mark.parametrize(
    "content", [b"", b"x", b"\x80\x04K\x01.", b"cos\nnothing\n.", b"\x80\x04}."]
)
def test_a_checkpoints_damaged_metadata_is_named(
    content: bytes, tmp_path: Path, ended: Ended
) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    assert f"error: {tmp_path / '.metadata'}: damaged: " in ended(inspect_checkpoint.main, tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"step": 1, "initial_model": 3}']
)
def test_a_checkpoints_damaged_state_is_named(content: bytes, tmp_path: Path, ended: Ended) -> None:
    (tmp_path / ".metadata").write_bytes(b"x")
    (tmp_path / "state.json").write_bytes(content)
    assert f"error: {tmp_path / 'state.json'}: damaged: " in ended(
        inspect_checkpoint.main, tmp_path
    )
    with pytest.raises(UserError, match=r"state\.json: damaged: "):  # as `efr evaluate` of it asks
        find_model(ModelConfig(path=str(tmp_path)), seed=0)


@pytest.mark.parametrize("latest", [b"", b"step_000099", b"\xff\x00", b"../..", b"\n"])
def test_a_run_whose_latest_checkpoint_is_not_there_is_named(latest: bytes, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest").write_bytes(latest)
    missing = r"latest: names '.*', which is no checkpoint there; .* holds none that verifies"
    with pytest.raises(UserError, match=missing):
        find_model(ModelConfig(path=str(tmp_path)), seed=0)


def said(read: Callable[[Path], object], path: Path) -> str | None:
    """The refusal of reading `path`."""
    try:
        read(path)
    except UserError as error:
        return str(error)
    return None


def spoilt(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def test_no_rollouts_end_in_a_traceback(tmp_path: Path) -> None:
    folder, rng, refused = RunFolder(tmp_path), random.Random(0), 0
    folder.write_rollouts(1, [group(), group()])
    path = folder.rollouts_path(1)
    text = zstandard.ZstdDecompressor().decompress(path.read_bytes())
    for turn in range(200):
        data = spoilt(text, rng) if turn % 2 else text
        packed = zstandard.ZstdCompressor().compress(data)
        path.write_bytes(packed if turn % 2 else spoilt(packed, rng))
        message = said(read_rollouts, path)
        refused += message is not None
        assert message is None or message.startswith(f"{path}: damaged rollouts")
    assert refused >= 100


@pytest.mark.parametrize("read", [read_evaluation, read_summary])
def test_no_record_ends_in_a_traceback(
    read: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    record = summarise([group().graded], "base")
    model = {
        "name": "m",
        "alpha": 0.1,
        **{key: record[key] for key in ("accuracy", "tokens", "tokens_by_difficulty")},
    }
    tree = record if read is read_evaluation else {"models": [model], "seconds": {"rl": 3.0}}
    path, rng, refused = tmp_path / "record.json", random.Random(0), 0
    data = json.dumps(tree).encode()
    path.write_bytes(data)
    assert read(path) == tree
    for _ in range(200):
        path.write_bytes(spoilt(data, rng))
        message = said(read, path)
        refused += message is not None
        assert message is None or message.startswith(f"{path}: ")
    assert refused >= 60
