"""A sweep's file: its members, their names, what each changes; the programs that are left after a
kill; the table.
"""

from __future__ import annotations

import csv
import json
import math
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyarrow import parquet

from megatron_efr import sweep
from megatron_efr.cluster.array import array_script
from megatron_efr.config import ConfigError
from megatron_efr.config.sweep import load_sweep, varied
from megatron_efr.errors import UserError
from megatron_efr.evaluation.records import summarise
from megatron_efr.report import __main__ as report
from megatron_efr.report import family
from megatron_efr.report.stored import read_summary
from megatron_efr.report.table import write_table
from megatron_efr.run import side_by_side
from megatron_efr.run.folder import RunFolder
from megatron_efr.types import Prompt
from tests.groups import graded

pytestmark = pytest.mark.alike

BASE = {
    "name": "base",
    "runs": "elsewhere",
    "model": {"path": "model", "init": "random"},
    "data": {"datasets": [{"path": "train.jsonl"}]},
    "method": {"name": "efr", "alpha": 0.1},
    "optimizer": {"lr": 1e-3},
    "evaluation": {"datasets": [{"path": "test.jsonl"}]},
}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a sweep's file beside its base."""

    def give(**keys: Any) -> Path:
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
        path = tmp_path / "family.yaml"
        tree = {"base": "base.yaml", "name": "family", "runs": str(tmp_path / "runs"), **keys}
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return path

    return give


METHODS = {
    "brief": {"method": {"name": "laser", "target": 40}},
    "grpo": {"algorithm": {"name": "grpo"}},
}


def test_members_are_the_product_and_each_is_named_by_what_it_changes(write: Write) -> None:
    path = write(
        members=METHODS,
        vary={"optimizer.lr": [1e-4, 2], "seed": [1, 2]},
        set={"train.iterations": 7},
    )
    made = load_sweep(path, ["rollout.samples=6"])
    parts = [
        (name, lr, seed)
        for name in METHODS
        for lr in ("lr-0.0001", "lr-2")
        for seed in ("seed-1", "seed-2")
    ]
    assert [member.name for member in made.members] == ["_".join(part) for part in parts]
    last = made.members[-1]
    assert (last.model, last.label) == ("grpo_lr-2", "grpo, lr 2"), "without the seed"
    assert last.config.name == "family/grpo_lr-2_seed-2"
    assert (last.config.seed, last.config.optimizer.lr, last.config.train.iterations) == (2, 2, 7)
    assert {member.config.rollout.samples for member in made.members} == {6}
    brief = made.members[0].config.method
    assert (brief.name, brief.options) == ("laser", {"target": 40}), (
        "a section replaces the base's: no alpha is left"
    )
    assert last.config.method.options == {"alpha": 0.1}
    assert (made.config.name, made.config.seed) == ("family", 42)
    keys = varied(made.members)
    assert keys["brief_lr-2_seed-1"] == {
        "method.name": "laser",
        "method.target": 40,
        "algorithm.name": "rloo",
        "optimizer.lr": 2.0,
        "seed": 1,
    }
    assert "method.target" not in keys["grpo_lr-2_seed-1"]


def test_values_give_names_and_may_be_given_names(write: Write) -> None:
    vary = {
        "algorithm.name": ["rloo", "dr_grpo"],
        "data.shuffle": [True],
        "evaluation.script": {"free": {"name": "plain"}},
        "method.alpha": [0, 0.25],
    }
    names = [member.name for member in load_sweep(write(vary=vary)).members]
    assert names[0] == "rloo_shuffle-true_free_alpha-0"
    assert names[-1] == "dr-grpo_shuffle-true_free_alpha-0.25"
    only_seeds = load_sweep(write(vary={"seed": [3]})).members
    assert [(member.name, member.model) for member in only_seeds] == [("seed-3", "trained")]
    own = {name: {"seed": seed, "method.alpha": seed} for seed, name in enumerate("ab")}
    assert [member.model for member in load_sweep(write(members=own)).members] == ["a", "b"], (
        "no seeds of one model"
    )


def test_a_key_into_a_list_is_among_those_that_vary(write: Write) -> None:
    vary = {"data.datasets.0.limit": [8, 9], "evaluation.datasets": {"own": [{"path": "x.jsonl"}]}}
    keys = varied(load_sweep(write(vary=vary, members={"a": {}, "b": {"method.beta": 1}})).members)
    assert [
        keys[f"{name}_limit-{n}_own"]["data.datasets.0.limit"] for name in "ab" for n in (8, 9)
    ] == [8, 9, 8, 9]
    assert [each["path"] for each in keys["a_limit-8_own"]["evaluation.datasets"]] == ["x.jsonl"]
    assert ("method.beta" in keys["a_limit-8_own"], keys["b_limit-8_own"]["method.beta"]) == (
        False,
        1,
    )


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        (
            {"vary": {"method.alhpa": [1]}, "memberz": {}},
            "family.yaml: memberz: unknown key; did you mean members?",
        ),
        ({}, "family.yaml: nothing varies"),
        ({"vary": {"seed": []}}, "a list in vary is empty"),
        (
            {"vary": {"optimizer": [{"lr": 1}]}},
            "vary.optimizer: a list or a section has no name of its own",
        ),
        ({"vary": {"seed": [1, 1]}}, "two members are named seed-1"),
        ({"vary": {"data.verifier": {"eval": 1}}}, "no member may be named eval"),
        ({"members": {"base": {}}, "vary": {"seed": [1, 2]}}, "no member may be named base"),
        (
            {"vary": {"model.path": ["a/" * 120]}},
            "its name has 244 characters, and a folder's at most 200",
        ),
        ({"members": {"a": {"name": "x"}}}, "member a: name: the sweep sets it for each"),
        (
            {"vary": {"method.alpha": [0], "method": {"m": {"name": "kimi"}}}},
            "method would replace method.alpha, set before it; put method first",
        ),
        (
            {"members": {"a": {"rollout.sampels": 2}, "b": {}, "c": {"rollout.sampels": 2}}},
            "family.yaml: members a, c: rollout.sampels: unknown key; did you mean samples",
        ),
        ({"members": {"a": {"method.name.x": 1}}}, "member a: method.name.x': name is a value"),
        ({"members": {"a/b": {}}}, "members"),
        ({"vary": {"seed": [1]}, "jobs": 0}, "jobs"),
        (
            {"vary": {"method.alpha": [0, 0.5]}, "against": "efr"},
            "no model is named efr; there are alpha-0, alpha-0.5",
        ),
    ],
)
def test_what_a_file_cannot_mean_is_said(keys: dict[str, Any], part: str, write: Write) -> None:
    with pytest.raises(ConfigError) as said:
        load_sweep(write(**keys))
    assert part in str(said.value)


def test_an_override_may_not_hide_what_varies(write: Write) -> None:
    path = write(vary={"method.alpha": [0, 0.1]})
    assert load_sweep(path, ["seed=5", "name=other"]).members[1].config.name == "other/alpha-0.1"
    for override in ("method.alpha=0.4", "method={name: kimi}"):
        with pytest.raises(
            ConfigError, match=r"members of .*family.yaml set method.alpha themselves; --only"
        ):
            load_sweep(path, [override])
    with pytest.raises(ConfigError, match="says itself what varies"):
        sweep.main([str(path), "--alphas=0"])
    with pytest.raises(
        ConfigError, match=r"base.yaml: no sweep's file, which names a `base`: .* --alphas"
    ):
        sweep.main([str(path.parent / "base.yaml")])


# -- programs, with stubs in their places
# ------------------------------------------------------------------------------


class Programs:
    """Stands for training and evaluation: notes what ran, and makes what they would."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ran, self.fails = folder, list[str](), set[str]()

    def run(self, name: str, command: list[str]) -> int:
        self.ran.append(name)
        if name in self.fails:
            return 1
        if name.startswith("eval "):
            member = name.removeprefix("eval ")
            RunFolder(self.folder).write_evaluation(member, record(member))
        else:
            (self.folder / name / "model").mkdir(parents=True, exist_ok=True)
            (self.folder / name / "model/config.json").write_text("{}")
            assert ("--resume" in command) == bool(self.resumes)
        return 0

    resumes = False


def record(name: str) -> dict[str, Any]:
    """Of 8 problems; those of member n of seed s are right more often, and briefer."""
    rise = sum(map(ord, name)) % 5
    prompts = [Prompt(f"p{i}", (1,), "", "7", {"difficulty": 1 + i % 2}) for i in range(8)]
    groups = [
        graded([i > rise, True], [10 + i + rise, 5], prompt=prompt)
        for i, prompt in enumerate(prompts)
    ]
    return summarise(groups, name)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    made = Programs(tmp_path / "runs/family")
    monkeypatch.setattr(
        side_by_side.Programs, "run", lambda _, name, command: made.run(name, command)
    )
    monkeypatch.setattr(sweep, "check_members", lambda *_: None)  # there are no files
    monkeypatch.setattr(family, "write_run_page", lambda folder, _: folder.report / "index.html")
    return made


ALL = ["efr_seed-1", "efr_seed-2", "grpo_seed-1", "grpo_seed-2"]
FAMILY = {
    "members": {"efr": {"method.alpha": 0.4}, "grpo": METHODS["grpo"]},
    "vary": {"seed": [1, 2]},
}


def test_every_model_is_made_and_the_table_has_a_row_for_each(
    write: Write, programs: Programs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.main([str(write(**FAMILY, note="A toy.", against="grpo")), "--seconds=sft=3"])
    assert programs.ran == [*ALL, "eval base", *(f"eval {name}" for name in ALL)]
    folder = tmp_path / "runs/family"
    assert f"report: {folder}/report/index.html" in capsys.readouterr().out
    table = parquet.read_table(folder / "table.parquet").to_pylist()
    assert [row["model"] for row in table] == ["base", *ALL]
    assert list(table[0])[:4] == ["model", "method.alpha", "seed", "algorithm.name"], (
        "what varies comes first"
    )
    assert [row["seed"] for row in table] == [None, 1, 2, 1, 2]
    assert [row["algorithm.name"] for row in table] == [None, "rloo", "rloo", "grpo", "grpo"]
    expected = record("grpo_seed-2")
    assert table[4]["accuracy"] == expected["accuracy"]
    assert [table[4]["tokens_low"], table[4]["tokens_high"]] == expected["tokens_ci"]
    assert table[4]["path"] == str(folder / "grpo_seed-2/model")
    written = list(csv.DictReader((folder / "table.csv").open()))
    assert [float(row["accuracy"]) for row in written] == [row["accuracy"] for row in table]
    summary = read_summary(folder / "summary.json")
    assert [(model["name"], model["base"]) for model in summary["models"]] == [
        (n, "base") for n in ("base", "efr", "grpo")
    ]
    grpo = summary["models"][2]
    two = [record(f"grpo_seed-{seed}")["tokens"] for seed in (1, 2)]
    assert (grpo["runs"], grpo["tokens_by_seed"], grpo["tokens"]) == (ALL[2:], two, sum(two) / 2)
    assert grpo["tokens_sd"] == pytest.approx(abs(two[0] - two[1]) / math.sqrt(2))
    assert (summary["note"], summary["against"], summary["seconds"]["sft"]) == (
        "A toy.",
        "grpo",
        3.0,
    )


def test_after_a_kill_finished_programs_stay_and_the_others_run(
    write: Write, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(write(**FAMILY))
    begun: list[str] = []

    def killed_in_the_third(_: object, name: str, command: list[str]) -> int:
        begun.append(name)
        if len(begun) >= 3:
            raise KeyboardInterrupt
        return programs.run(name, command)

    with monkeypatch.context() as patch:
        patch.setattr(side_by_side.Programs, "run", killed_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            sweep.main([path])
    finished, programs.ran, programs.resumes = list(programs.ran), [], True
    sweep.main([path, "--resume"])
    assert [*finished, *programs.ran] == [*ALL, "eval base", *(f"eval {name}" for name in ALL)]
    programs.ran = []
    sweep.main([path, "--resume"])
    assert programs.ran == [], "all have finished"
    (programs.folder / "eval/base.json").unlink()
    sweep.main([path, "--resume", "train.iterations=200"])
    assert programs.ran == [*ALL, "eval base", *(f"eval {name}" for name in ALL)], (
        "they have been trained on"
    )


def test_the_page_can_be_written_again_with_all_runs_of_a_model(
    write: Write, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep.main([str(write(**FAMILY))])
    for name in ALL:
        (programs.folder / name / "config.yaml").write_text("seed: 1\n")
    seen: list[list[str]] = []
    monkeypatch.setattr(
        report,
        "write_run_page",
        lambda _, members: seen.append([member.path.name for member in members]),
    )
    assert "| grpo | " in report.report(programs.folder, seeds=False)
    assert seen == [ALL]


def test_a_folder_with_work_is_not_begun_anew(write: Write, programs: Programs) -> None:
    path = str(write(**FAMILY))
    (programs.folder / "grpo_seed-1/rollouts/x").mkdir(parents=True)
    with pytest.raises(UserError, match=r"there is work of member grpo_seed-1; pass --resume"):
        sweep.main([path])
    assert programs.ran == []


def test_what_fails_is_named_and_the_others_are_evaluated_and_reported(
    write: Write, programs: Programs
) -> None:
    programs.fails = {"efr_seed-2", "eval grpo_seed-1"}
    with pytest.raises(UserError, match=r"efr_seed-2, eval grpo_seed-1 failed; see .*logs"):
        sweep.main([str(write(**FAMILY))])
    rows = parquet.read_table(programs.folder / "table.parquet").to_pylist()
    assert [row["model"] for row in rows] == ["base", "efr_seed-1", "grpo_seed-2"]
    models = read_summary(programs.folder / "summary.json")["models"]
    assert [model["runs"] for model in models] == [["base"], ["efr_seed-1"], ["grpo_seed-2"]]


def test_the_time_of_a_training_that_fails_is_the_trainings(
    write: Write, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs.fails = {"grpo_seed-2"}

    def run(_: object, name: str, command: list[str]) -> int:
        time.sleep(0.3 * (name == "grpo_seed-2"))
        return programs.run(name, command)

    monkeypatch.setattr(side_by_side.Programs, "run", run)
    with pytest.raises(UserError, match="grpo_seed-2 failed"):
        sweep.main([str(write(**FAMILY))])
    seconds = read_summary(programs.folder / "summary.json")["seconds"]
    assert seconds["rl"] >= 0.3
    assert seconds["total"] == pytest.approx(seconds["rl"] + seconds["evaluate"])


def test_some_members_alone_are_made_with_what_they_begin_with(
    write: Write, programs: Programs
) -> None:
    path = str(write(**FAMILY))
    sweep.main([path, "--only=efr*1"])
    assert programs.ran == ["efr_seed-1", "eval base", "eval efr_seed-1"]
    with pytest.raises(ConfigError, match="--only sgpo: no member has such a name"):
        sweep.main([path, "--only=sgpo"])


def test_the_tasks_of_an_array_make_a_model_each_and_the_last_one_writes_the_table(
    write: Write, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(**FAMILY, slurm=["--gpus=8", "--time=01:00:00"])
    sweep.main([str(path), "--list"])
    assert capsys.readouterr().out.split() == [
        x for n, name in enumerate(["base", *ALL]) for x in (str(n), name)
    ]
    assert not programs.folder.exists(), "listing writes nothing"
    sweep.main([str(path), "--slurm", "--note=two words"])
    script = (programs.folder / "sweep.sbatch").read_text()
    assert f"sbatch {programs.folder}/sweep.sbatch" in capsys.readouterr().out
    assert "#SBATCH --array=0-4\n" in script
    assert "#SBATCH --gpus=8\n#SBATCH --time=01:00:00\n" in script
    [line] = [line for line in script.splitlines() if line.startswith("srun")]
    command = line.partition("-m megatron_efr.sweep ")[2].partition(" ||")[0]
    command = shlex.split(command)
    assert command == [
        str(path),
        "--note=two words",
        "--resume",
        "--member",
        "$SLURM_ARRAY_TASK_ID",
    ]
    programs.resumes = True
    for number in (3, 0, 1, 4, 2):
        assert not (programs.folder / "table.csv").exists()
        sweep.main([*command[:-1], str(number)])
    assert programs.ran[:3] == ["grpo_seed-1", "eval grpo_seed-1", "eval base"]
    assert len(parquet.read_table(programs.folder / "table.parquet")) == 5
    with pytest.raises(ConfigError, match="--member 5: there are 5 models, 0 to 4"):
        sweep.main([*command[:-1], "5"])


def sbatch_reads(line: str) -> str:
    """The first argument of a directive as sbatch takes it apart: a space ends it unless it is
    quoted, also behind a backslash, and `#` begins a comment.
    """
    read, quote, escaped = "", "", False
    for sign in line:
        if not quote and sign.isspace():
            break
        if escaped:
            read, escaped = read + sign, False
        elif sign == "\\":
            escaped = True
        elif sign == quote:
            quote = ""
        elif not quote and sign in "\"'":
            quote = sign
        elif not quote and sign == "#":
            break
        else:
            read += sign
    return read


def test_a_folder_of_any_name_is_one_argument_of_sbatch() -> None:
    """`%%` is a `%` in a file's name."""
    for name in ("/runs/a/logs", "/a b/it's #1/100%", '/a"b\\c d'):
        script = array_script("n", 2, ["x"], Path(name), [], 75)
        [line] = [line for line in script.splitlines() if line.startswith("#SBATCH --output")]
        wanted = f"--output={name.replace('%', '%%')}/task-%a.txt"
        assert sbatch_reads(line.removeprefix("#SBATCH ")) == wanted


def test_members_of_other_beginnings_have_bases_of_their_own(
    write: Write, programs: Programs
) -> None:
    sweep.main([str(write(vary={"model.path": {"small": "s", "large": "l"}, "seed": [1, 2]}))])
    assert programs.ran[4:6] == ["eval base", "eval base-2"], "one for all seeds"
    models = read_summary(programs.folder / "summary.json")["models"]
    assert [(model["name"], model["base"]) for model in models[2:]] == [
        ("small", "base"),
        ("large", "base-2"),
    ]


def test_a_table_keeps_whole_numbers_and_writes_what_is_mixed_as_text(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": 1, "c": True, "d": [1]}, {"a": 2, "b": 0.5, "c": "x"}, {"e": "y"}]
    write_table(rows, tmp_path)
    read = parquet.read_table(tmp_path / "table.parquet").to_pydict()
    assert read == {
        "a": [1, 2, None],
        "b": [1.0, 0.5, None],
        "c": ["true", "x", None],
        "d": ["[1]", None, None],
        "e": [None, None, "y"],
    }
    assert json.dumps(read["a"]) == "[1, 2, null]"
