"""The run folder: lossless, claimed by one configuration, whole after a crash at any point."""

import dataclasses
import datetime
import json
import math
import os

import numpy as np
import pytest
import zstandard

from megatron_efr.durable import UnwritableError, write_atomic
from megatron_efr.evaluation.records import summarise
from megatron_efr.rollout.group_json import (
    decode_credited,
    decode_group,
    encode_credited,
    encode_group,
)
from megatron_efr.run.folder import RunFolder, RunFolderError
from megatron_efr.scripts import Budget, Forks, Plain
from megatron_efr.steps import Part
from megatron_efr.types import (
    Branch,
    Credit,
    Credited,
    Grade,
    Graded,
    Group,
    Prompt,
    Response,
    Rewarded,
    VersionSpan,
)

CONFIG = """
name: a
runs: runs
seed: 42
method: {alpha: 0.1}
optimizer: {lr: 1.0e-4, schedule: constant}
train: {iterations: 10}
observe: {tensorboard: true}
data: {mix: [{path: x}, {path: y}]}
evaluation: {every: 5, datasets: [{path: e}]}
checkpoint: {keep: 2}
rollout: {max_new_tokens: 100}
"""


def group(index=0, n=3):
    rng = np.random.default_rng(index)
    meta = {"difficulty": 3, "dataset": "sums", "note": "ünï\u2028code\nline"}
    responses = tuple(
        Response(
            tokens=tuple(rng.integers(0, 10**6, 5).tolist()),
            logprobs=np.array([*rng.normal(size=4), -math.inf], dtype=np.float32),
            finish="length" if i else "stop",
            versions=(VersionSpan(1, 0, 2), VersionSpan(2, 2, 5)),
            text='a "quoted"\ntext',
            routed_experts=None
            if i == 1
            else rng.integers(0, 128, (7, 2, 4)).astype((np.int8, np.int16)[i > 0]),
            parts=(Part("opening", 0, 2, "chosen"), Part("response", 2, 5, "length")) if i else (),
            branches=(Branch("probe", 3, (Response((7,), np.zeros(1, np.float32), "stop"),)),)
            if i
            else (),
        )
        for i in range(n)
    )
    scripts = (Plain(), *[Forks(at=(2, 30), tokens=9), Budget(most=7, end="</t>")] * (n // 2))[:n]
    return Group(
        Prompt(f"p{index}", (1, 2, 3), "q", "42", meta),
        responses,
        2**62 + index,
        scripts,
        {"budget": 7},
    )


def credited(index=0):
    rng = np.random.default_rng(index)
    verdicts = ((), (Grade("wrong", 0.0),), (Grade("correct", 1.0),))
    graded = Graded(
        group(index),
        (Grade("correct", 1.0), Grade("timeout", 0.0), Grade("wrong", 0.1 + 0.2)),
        verdicts,
    )
    rewards, masked = rng.random(3), rng.random(3) < 0.5
    lengths = [len(response.tokens) for response in graded.group.responses]
    per_token, weight = (tuple(rng.random(length) for length in lengths) for _ in range(2))
    branches = (np.zeros(0), np.zeros(0), np.array([-0.1 - 0.2]))
    credit = Credit(
        np.array([0.1 + 0.2, math.pi, -1e-300]),
        per_token,
        weight,
        masked,
        branches,
        beginnings=True,
    )
    return Credited(Rewarded(graded, rewards), credit)


def assert_same(one, two, name=""):
    """Equal to the last bit, down to every array."""
    assert type(one) is type(two), name
    if isinstance(one, np.ndarray):
        assert (one.dtype, one.shape) == (two.dtype, two.shape)
        assert one.tobytes() == two.tobytes()
    elif dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            assert_same(getattr(one, field.name), getattr(two, field.name), field.name)
    elif isinstance(one, tuple):
        for a, b in zip(one, two, strict=True):
            assert_same(a, b, name)
    else:
        assert one == two, name


def test_a_group_comes_back_exactly():
    assert_same(decode_group(encode_group(group())), group())
    assert_same(decode_credited(encode_credited(credited())), credited())
    bare = Group(
        Prompt("p", (1,), "q", "1"), (Response((1,), np.array([-0.1], dtype=np.float32), "stop"),)
    )
    assert_same(decode_group(encode_group(bare)), bare)
    before = json.loads(encode_group(bare))  # as it was written before there were scripts
    del (
        before["scripts"],
        before["note"],
        before["responses"][0]["parts"],
        before["responses"][0]["branches"],
    )
    assert_same(decode_group(json.dumps(before)), bare)
    assert "\n" not in encode_group(group())


def test_rollouts_of_before_a_field_was_there_are_read():
    tree = json.loads(encode_credited(credited()))
    del tree["per_token"], tree["weight"], tree["branches"], tree["beginnings"], tree["verdicts"]
    found = decode_credited(json.dumps(tree))
    without = {"per_token": None, "weight": None, "branches": None, "beginnings": False}
    assert_same(found.credit, credited().credit._replace(**without))
    assert found.graded.branches == ()


def test_every_field_of_a_group_is_kept():
    tree = json.loads(encode_group(group()))
    assert set(tree) == {field.name for field in dataclasses.fields(Group)}
    assert set(tree["prompt"]) == {field.name for field in dataclasses.fields(Prompt)}
    assert set(tree["responses"][0]) == {field.name for field in dataclasses.fields(Response)}
    later = set(json.loads(encode_credited(credited()))) - set(tree)
    assert later == {"statuses", "scores", "rewards", "verdicts", *Credit._fields}


def test_rollouts_come_back_exactly_and_are_named_by_step(tmp_path):
    folder = RunFolder(tmp_path)
    groups = [credited(i) for i in range(4)]
    folder.write_rollouts(10, groups)
    path = tmp_path / "rollouts" / "step_000010.jsonl.zst"
    assert len(zstandard.ZstdDecompressor().decompress(path.read_bytes()).splitlines()) >= 4
    for one, two in zip(folder.read_rollouts(10), groups, strict=True):
        assert_same(one, two)
    with pytest.raises(RunFolderError, match="step 11 were not kept"):
        folder.read_rollouts(11)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(RunFolderError, match="damaged rollouts"):
        folder.read_rollouts(10)


def test_an_atomic_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.txt"
    write_atomic(path, "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(
        UnwritableError, match=r"file\.txt: cannot be written: disk full; [\d,]+ bytes are free at "
    ):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_claiming_a_new_folder_saves_the_configuration(tmp_path):
    folder = RunFolder(tmp_path / "a")
    folder.claim(CONFIG)
    assert folder.config.read_text() == CONFIG
    folder.claim(CONFIG)  # nothing has been done there yet


def test_another_configuration_is_refused_with_its_differing_keys(tmp_path):
    folder = RunFolder(tmp_path)
    folder.claim(CONFIG)
    folder.append_metrics(1, {"accuracy": 0.5})
    ours = (
        CONFIG.replace("alpha: 0.1", "alpha: 0.4")
        .replace("path: y", "path: z")
        .replace("seed: 42", "dtype: bf16")
    )
    for resume in (False, True):
        with pytest.raises(RunFolderError) as caught:
            folder.claim(ours, resume)
        message = str(caught.value)
        assert "method.alpha: there 0.1, here 0.4" in message
        assert "data.mix.1.path: there 'y', here 'z'" in message
        assert "seed: there 42, here '(not set)'" in message
        assert "dtype: there '(not set)', here 'bf16'" in message
        assert "train.iterations" not in message
    assert folder.config.read_text() == CONFIG


def test_a_folder_whose_run_stopped_before_any_work_takes_the_corrected_configuration(tmp_path):
    folder = RunFolder(tmp_path)
    folder.claim(CONFIG)
    corrected = CONFIG.replace("path: y", "path: z")
    with pytest.raises(RunFolderError, match=r"data\.mix\.1\.path"):
        folder.claim(corrected, resume=True)
    folder.claim(corrected)
    assert folder.config.read_text() == corrected


def test_the_same_configuration_needs_resume_once_there_is_work(tmp_path):
    folder = RunFolder(tmp_path)
    folder.claim(CONFIG)
    folder.append_metrics(1, {"accuracy": 0.5})
    with pytest.raises(RunFolderError, match="pass --resume"):
        folder.claim(CONFIG)
    folder.claim(CONFIG, resume=True)
    folder.config.unlink()
    with pytest.raises(RunFolderError, match=r"no config\.yaml"):
        folder.claim(CONFIG, resume=True)


def test_groups_of_a_first_iteration_that_was_killed_are_work_too(tmp_path):
    folder = RunFolder(tmp_path)
    folder.claim(CONFIG)
    folder.journal(1).append(group())
    with pytest.raises(RunFolderError, match="pass --resume"):
        folder.claim(CONFIG)


def test_a_resumed_run_may_train_longer_only_where_that_bends_no_schedule(tmp_path):
    folder = RunFolder(tmp_path)
    folder.claim(CONFIG)
    longer = CONFIG.replace("iterations: 10", "iterations: 20").replace(
        "tensorboard: true", "tensorboard: false"
    )
    folder.append_metrics(1, {"accuracy": 0.5})
    with pytest.raises(RunFolderError, match=r"train\.iterations: there 10, here 20"):
        folder.claim(longer)
    folder.claim(longer, resume=True)
    assert folder.config.read_text() == longer
    cosine = RunFolder(tmp_path / "cosine")
    cosine.claim(CONFIG.replace("constant", "cosine"))
    with pytest.raises(RunFolderError, match=r"only with optimizer\.schedule: constant"):
        cosine.claim(longer.replace("constant", "cosine"), resume=True)


def test_a_resumed_run_may_change_what_touches_no_iteration_before_it(tmp_path):
    folder = RunFolder(tmp_path)
    folder.claim(CONFIG)
    folder.append_metrics(1, {"accuracy": 0.5})
    changed = CONFIG.replace(
        "every: 5, datasets: [{path: e}]", "every: 2, datasets: [{path: f}, {path: g}]"
    )
    changed = changed.replace("keep: 2", "keep: 7").replace(
        "max_new_tokens: 100", "max_new_tokens: 60"
    )
    folder.claim(changed, resume=True)
    assert folder.config.read_text() == changed
    longer = changed.replace("max_new_tokens: 60", "max_new_tokens: 61")
    with pytest.raises(
        RunFolderError, match=r"rollout\.max_new_tokens: there 60, here 61\n.*but only downwards"
    ):
        folder.claim(longer, resume=True)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data.replace(b'"step": 2', b'"step": ?'), r"metrics\.jsonl:2: damaged"),
        (lambda data: data.replace(b'"step": 2', b'"stop": 2'), r"metrics\.jsonl:2: damaged"),
        (lambda data: b"\x00" * 40 + b"\n" + data, r"metrics\.jsonl:1: damaged"),
        (lambda data: b"\xff" + data, r"metrics\.jsonl:1: damaged"),
        (lambda data: b"7\n" + data, r"metrics\.jsonl:1: damaged"),
    ],
)
def test_damaged_metrics_are_named_by_file_and_line_before_anything_is_touched(
    tmp_path, damage, said
):
    folder = RunFolder(tmp_path)
    folder.claim(CONFIG)
    for step in (1, 2, 3):
        folder.append_metrics(step, {"accuracy": 0.5})
    folder.metrics.write_bytes(damage(folder.metrics.read_bytes()))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RunFolderError, match=said):
        folder.claim(CONFIG.replace("keep: 2", "keep: 3"), resume=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_missing_metrics_are_named_and_a_resumed_run_says_where_it_goes_on(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3, 5):
        folder.append_metrics(step, {"accuracy": 0.5})
    folder.go_on_from(5, 8)
    said = capsys.readouterr().err
    assert "metrics.jsonl: 1 lines are missing, the first of iteration 4" in said
    assert f"{tmp_path}: goes on after iteration 5 of 8" in said
    folder.metrics.unlink()
    folder.go_on_from(8, 8, "update", every=4)
    said = capsys.readouterr().err
    assert "metrics.jsonl: 2 lines are missing, the first of update 4" in said
    assert f"{tmp_path}: finished: its 8 updates are made" in said
    folder.go_on_from(0, 8)
    said = capsys.readouterr().err
    assert "lines are missing" not in said
    assert "no checkpoint yet: begins with iteration 1 of 8" in said


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "\x00"])
def test_a_damaged_configuration_is_named(tmp_path, text):
    folder = RunFolder(tmp_path)
    folder.append_metrics(1, {})
    folder.config.write_text(text)
    with pytest.raises(RunFolderError, match=r"config\.yaml: (not readable|damaged)"):
        folder.claim(CONFIG, resume=True)


def test_the_day_on_which_work_began_is_kept_for_good(tmp_path):
    folder = RunFolder(tmp_path / "a")
    first = folder.began()
    assert datetime.date.fromisoformat(first) == datetime.date.today()
    folder.first_day.write_text("2001-02-03\n")
    assert folder.began() == "2001-02-03"
    assert RunFolder(tmp_path / "a").began() == "2001-02-03"
    folder.first_day.write_text("soon")
    with pytest.raises(RunFolderError, match=r"began: 'soon' is no day"):
        folder.began()


def test_what_killed_writes_left_is_removed_by_the_next_owner(tmp_path):
    folder = RunFolder(tmp_path)
    folder.claim(CONFIG)
    (tmp_path / ".config.yaml.77.tmp").write_text("half")
    folder.go_on_from(0, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_metrics_cut_at_the_resumed_step_go_on_as_an_uninterrupted_runs(tmp_path):
    whole, killed = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "killed")
    lines = {step: {"loss": 1 / 3 * step, "kl": np.float32(0.1)} for step in range(1, 6)}
    for step, metrics in lines.items():
        whole.append_metrics(step, metrics)
    for step in (1, 2, 3, 4):
        killed.append_metrics(step, lines[step])
    with open(killed.metrics, "a") as file:
        file.write('{"step": 5, "lo')
    assert [line["step"] for line in killed.read_metrics()] == [1, 2, 3, 4]
    assert killed.truncate_metrics(2) == 2
    for step in (3, 4, 5):
        killed.append_metrics(step, lines[step])
    assert killed.metrics.read_bytes() == whole.metrics.read_bytes()


def test_metrics_are_strict_json(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_metrics(
        1, {"a": math.nan, "b": np.float64(math.inf), "c": np.int64(3), "d": None, "e": "x"}
    )
    assert folder.read_metrics() == [{"step": 1, "a": None, "b": None, "c": 3, "d": None, "e": "x"}]


def test_journals_are_kept_per_iteration_until_a_checkpoint_covers_them(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.journal(step).append(group(step))
    folder.monitor(0).write_text("half of the monitor set, before the first iteration\n")
    folder.go_on_from(0, 5)
    assert folder.monitor(0).exists(), "there is no checkpoint that has it"
    assert [len(folder.journal(step).read().groups) for step in (1, 2, 3)] == [1, 1, 1]
    folder.clear_journals(2)
    assert [len(folder.journal(step).read().groups) for step in (1, 2, 3)] == [0, 0, 1]
    assert not folder.monitor(0).exists()


def test_evaluations_come_back_by_name(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.read_evaluations() == {}
    record = summarise([credited().graded], "base")
    folder.write_evaluation("base", record)
    assert folder.read_evaluations() == {"base": record}
    with pytest.raises(RunFolderError, match="without '/'"):
        folder.write_evaluation("../x", {})
