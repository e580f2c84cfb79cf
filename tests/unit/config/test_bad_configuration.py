"""Configurations that cannot run, by hand and by chance: each ends in a sentence that names file or
override.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_efr import methods
from megatron_efr.config import ConfigError, EvaluateConfig, RunConfig, SftConfig, TrainConfig
from megatron_efr.config.file import dump, load

pytestmark = pytest.mark.alike

INPUTS = 200
TRAIN = """name: a
model: {path: m}
data:
  datasets:
    - path: x.jsonl
    - {path: y.jsonl, limit: 3}
  prompt: {template: "Solve {question}"}
method: {name: efr, alpha: 0.1}
optimizer: {lr: 1e-4}
"""
SPREADING = f"a: &a [{'x,' * 99}]\nb: &b [{'*a,' * 99}]\nc: [{'*b,' * 99}]\n"
SFT = "name: s\nmodel: {path: m}\ndata: {path: x}\noptimizer: {lr: 1e-3}\ntrain: {updates: 1}\n"
EVALUATE = "name: e\nmodel: {path: m}\nevaluation: {datasets: [{path: x}]}\n"
PROGRAMS: dict[str, tuple[type[RunConfig], str]] = {
    "train": (TrainConfig, TRAIN),
    "sft": (SftConfig, SFT),
    "evaluate": (EvaluateConfig, EVALUATE),
}


def read(path: Path, text: str | bytes, program: str = "train", *overrides: str) -> str | None:
    """The refusal of a configuration at a program's start; None if it is taken."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        config = load(PROGRAMS[program][0], path, overrides)
        if isinstance(config, TrainConfig):
            methods.build(config.method, config.rollout, config.algorithm)
        assert load(type(config), _written(path, dump(config))) == config
    except ConfigError as error:
        return str(error)
    return None


def _written(path: Path, text: str) -> Path:
    again = path.with_name("again.yaml")
    again.write_text(text)
    return again


def test_nothing_is_wrong_with_what_is_spoilt_below(tmp_path: Path) -> None:
    for program, (_, text) in PROGRAMS.items():
        assert read(tmp_path / "c.yaml", text, program) is None


FILES: list[tuple[str, str | bytes, list[str]]] = [
    ("nothing", "", ["c.yaml: expected a mapping of sections, found nothing"]),
    ("comments alone", "# a\n# b\n", ["c.yaml: expected a mapping of sections, found nothing"]),
    ("a list", "- name\n- model\n", ["c.yaml: expected a mapping of sections, found a list"]),
    ("a text", "name\n", ["c.yaml: expected a mapping of sections, found a str"]),
    ("a number", "3\n", ["c.yaml: expected a mapping of sections, found a int"]),
    ("latin-1", TRAIN.encode() + b"runs: caf\xe9\n",
        ["c.yaml:10: not UTF-8", "0xe9", "save the file as UTF-8"]),
    ("utf-16", TRAIN.encode("utf-16"), ["c.yaml:1: not UTF-8"]),
    ("a control character", TRAIN + "runs: a\x07b\n",
        ["c.yaml:10: not valid YAML: the character U+0007"]),
    ("duplicate sections", TRAIN + "model: {path: n}\n",
        ["c.yaml:10: model: set twice, first in line 2"]),
    ("duplicate keys", TRAIN + "train:\n  updates: 2\n  updates: 4\n",
        ["c.yaml:12: train.updates: set twice"]),
    ("duplicates in a list", TRAIN.replace("limit: 3", "path: z"),
        ["c.yaml:6: data.datasets.1.path: set twice"]),
    ("octal", TRAIN + "seed: 010\n", ["c.yaml:10: seed: 010 is 8 to YAML", "write 10 or 8"]),
    ("octal within", TRAIN + "train: {updates: 0200}\n", ["c.yaml:10: train.updates: 0200 is 128"]),
    ("sexagesimal", TRAIN + "parallel: {wait_limit_s: 1:30}\n",
        ["c.yaml:10: parallel.wait_limit_s: "
        "1:30 is 90"]),
    ("sexagesimal float", TRAIN + "parallel: {wait_limit_s: 1:30.5}\n", ["parallel.wait_limit_s: "
        "1:30.5 is 90.5"]),
    ("None", TRAIN + "observe: {wandb: None}\n", ["c.yaml:10: observe.wandb: None is a text "
        "in YAML; write null"]),
    ("None in a list", TRAIN + "rollout: {urls: [None]}\n", ["c.yaml:10: rollout.urls.0: "
        "None is a text"]),
    ("a date", TRAIN + "runs: 2024-05-06\n", ["c.yaml:10: runs: 2024-05-06 is a date "
        "to YAML; put quotes"]),
    ("a tab", "name: a\nmodel:\n\tpath: m\n", ["c.yaml:3: not valid YAML", "a tab may not"]),
    ("two documents", TRAIN + "---\nname: b\n", ["c.yaml:10: not valid "
        "YAML", "one file is one configuration"]),
    ("an open bracket", "name: [a\n", ["c.yaml:2: not valid YAML"]),
    ("an open quote", 'name: "a\n', ["c.yaml:2: not valid YAML"]),
    ("a colon in a text", TRAIN + "runs: a: b\n", ["c.yaml:10: not valid YAML: "
        "mapping values", "put quotes around"]),
    ("a per cent sign", TRAIN + "runs: %d\n", ["c.yaml:10: not valid YAML", "put quotes around"]),
    ("a bad indent", TRAIN + "  seed: 3\n", ["c.yaml:10: not valid YAML"]),
    ("an unknown anchor", TRAIN + "seed: *s\n", ["c.yaml:10: not valid YAML", "undefined alias"]),
    ("an anchor in itself", TRAIN + "observe: &o {wandb: *o}\n", ["observe.wandb: this anchor "
        "holds itself"]),
    ("a merge of a text", TRAIN + "<<: 3\n", ["c.yaml:10: not valid YAML", "for merging"]),
    ("a merge with an unknown key", TRAIN + (
        "rollout: {<<: {sampels: "
        "3}}\n"
    ), ["rollout.sampels: unknown key"]),
    ("aliases without end", SPREADING, ["c.yaml:3: c: its aliases spread"]),
    ("an object", TRAIN + "runs: !!python/object:os.x {}\n", ["c.yaml:10: runs: "
        "the tag", "leave it out"]),
    ("a set", TRAIN + "observe: !!set {wandb}\n", ["c.yaml:10: observe: the tag !!set "
        "has no meaning"]),
    ("bytes", TRAIN + "runs: !!binary YQ==\n", ["c.yaml:10: runs: the tag !!binary "
        "has no meaning"]),
    ("a sign of its own", TRAIN + "runs: =\n", ["c.yaml:10: runs: = is a sign of its own to YAML"]),
    ("a number for a key", TRAIN + "5: x\n", ["c.yaml:10: 5: a key is text; put quotes"]),
    ("a boolean for a key", TRAIN + "on: x\n", ["c.yaml:10: on: a key is text; put quotes"]),
    ("a list for a key", TRAIN + "? [a]\n: x\n", ["c.yaml:10: a key that is a list or a "
        "section: a key is text"]),
    ("half a character", TRAIN + 'runs: "\\ud800"\n', ["runs: a text with half "
        "a character", "U+D800"]),
    ("a null character", TRAIN + 'runs: "a\\0b"\n', ["c.yaml:10: runs: a text with the "
        "character U+0000"]),
    ("nested too deeply", "name: " + "[" * 1500, ["c.yaml: not valid YAML: nested too deeply"]),
    ("digits without end", TRAIN + "seed: " + "9" * 5000 + "\n",
        ["c.yaml:10: seed: 9999", "(5000 digits)"]),
    ("no digits", TRAIN + "seed: 0x_\n", ["c.yaml:10: seed: 0x_ is no number that can be read"]),
    ("a number by tag", TRAIN + "seed: !!int x\n", ["c.yaml:10: seed: x is no number"]),
    ("an empty section", TRAIN + "rollout:\n", ["c.yaml: rollout: a section of keys belongs "
        "here, not nothing"]),
    ("a value for a section", TRAIN + "train: 3\n", ["c.yaml: train: a section of keys "
        "belongs here, not 3"]),
    ("a list for a section", TRAIN + "train: [3]\n", ["c.yaml: train: a section of keys belongs "
        "here, not [3]"]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "words"), FILES, ids=[kind for kind, _, _ in FILES])
def test_a_file_that_cannot_be_read_as_meant(
    kind: str, text: str | bytes, words: list[str], tmp_path: Path
) -> None:
    message = read(tmp_path / "c.yaml", text)
    assert message is not None
    assert [word for word in words if word not in message] == [], message


OVERRIDES: list[tuple[str, str, list[str]]] = [
    ("train", "seed=9223372036854775808", ["seed: 9223372036854775808 is beyond 2^63 - 1"]),
    ("train", "seed=-1", ["c.yaml: seed: ", "(got -1)"]),
    ("train", "seed=", ["c.yaml: seed: ", "(got nothing)"]),
    ("train", "rollout..samples=3", ["'rollout..samples=3': an override reads section.key=value"]),
    ("train", "rollout.samples=08", ["c.yaml: rollout.samples: ", "(got '08')"]),
    ("train", "rollout.samples=010", ["'rollout.samples=010': rollout.samples: 010 is 8"]),
    ("train", "observe.wandb=None", ["'observe.wandb=None': observe.wandb: None is a text"]),
    ("train", "observe={wandb: a, wandb: b}", ["observe.wandb: set twice"]),
    ("train", "runs=a: b: c", ["'runs=a: b: c': the value is not valid YAML"]),
    ("train", "rollout.temperature=.inf", ["c.yaml: rollout.temperature: Input should be "
        "a finite number (got inf)"]),
    ("train", "optimizer.eps=1e999", ["c.yaml: optimizer.eps: Input should be a "
        "finite number (got inf)"]),
    ("train", "method.alpha=.nan", ["method.alpha: Input should be a finite number (got nan)"]),
    ("train", "optimizer.min_lr=2e-4", ["c.yaml: optimizer.min_lr: 0.0002 is above "
        "optimizer.lr = 0.0001"]),
    ("sft", "optimizer.min_lr=1", ["c.yaml: optimizer.min_lr: 1 is above optimizer.lr = 0.001"]),
    ("train", "data.prompt.template=Solve it", ["c.yaml: data.prompt.template: leaves "
        "the question out"]),
    ("train", "data.prompt.template='{question} {answer}'", ["data.prompt.template: {answer} "
        "is no field"]),
    ("sft", "prompt.template='{question} {}'", ["c.yaml: prompt.template: "
        "{} is no field", "doubled"]),
    ("sft", "prompt.template='{question'", ["c.yaml: prompt.template: no str.format "
        "template", "doubled"]),
    ("evaluate", "prompt.template='{question.x}'", ["c.yaml: prompt.template: {question.x} "
        "is no field"]),
    ("evaluate", "prompt.template='{question:>{w}}'", ["c.yaml: prompt.template: {question:>{w}} "
        "is no field"]),
    ("evaluate", "prompt.template=[a]", ["c.yaml: prompt.template: Input should be a "
        "valid string (got ['a'])"]),
    ("train", "data.datasets.1.path=z/x.jsonl", ["c.yaml: data.datasets.1: z/x.jsonl and x.jsonl "
        "are both called 'x'"]),
    ("evaluate", "evaluation.datasets=[{path: a/b}, {path: c/b}]", ["evaluation.datasets.1: c/b "
        "and a/b are both"]),
    ("evaluate", "model.lora={rank: 4}", ["c.yaml: model.lora: an evaluation trains none",
        "leave it out"]),
    ("evaluate", "evaluation.samples_by_dataset={2024: 3}", ["samples_by_dataset: 2024: a key "
        "is text; put quotes"]),
    ("sft", "train.updates=1.0", ["c.yaml: train.updates: ", "(got 1.0)"]),
    ("sft", "train=[1]", ["c.yaml: train: a section of keys belongs here, not [1]"]),
]  # fmt: skip


@pytest.mark.parametrize(("program", "override", "words"), OVERRIDES)
def test_an_override_that_cannot_be_meant(
    program: str, override: str, words: list[str], tmp_path: Path
) -> None:
    message = read(tmp_path / "c.yaml", PROGRAMS[program][1], program, override)
    assert message is not None
    assert [word for word in words if word not in message] == [], message


def test_there_are_sixty_by_hand() -> None:
    assert len(FILES) + len(OVERRIDES) >= 60


def test_what_yaml_offers_and_means_what_it_says_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    merged = TRAIN.replace("model: {", "model: &m {") + "rollout: &r {samples: 4}\nrun: 1\n"
    assert "run: unknown key; did you mean runs?" in str(read(path, merged))
    path.write_bytes(
        b"\xef\xbb\xbf"
        + TRAIN.replace("\n", "\r\n").encode()
        + b"rollout: {<<: &r {samples: 4}, samples: 2}\r\n"
    )
    config = load(TrainConfig, path, ["seed=0x10", "runs='None'", "observe={wandb: '010'}"])
    assert (config.rollout.samples, config.seed, config.runs, config.observe.wandb) == (
        2,
        16,
        "None",
        "010",
    )
    path.write_text(TRAIN + "rollout:\n")
    assert load(TrainConfig, path, ["rollout.samples=4"]).rollout.samples == 4


# -- by chance
# --------------------------------------------------------------------------------------------------

VALUES = [
    "null", "None", "true", "yes", "0", "1", "-1", "010", "1:30", "3.5", "1e-4", ".nan", "-.inf",
    "1e999", "0x1F", "''",
    "text", "'8'", "[]", "[1]", "[[]]", "{}", "{a: 1}", "{5: 1}", "2024-01-01", "~", "*x", "&x 1",
    "!!set {a}", "!y z",
    '"\\ud800"', '"\\0"', "9" * 30, "9" * 5000, "'{question} {x}'", "'{question'", "\t1", "a: b",
    "- 1", "<<", "=", "%",
]  # fmt: skip


def paths(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of a configuration written out, sections and places in lists included."""
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    return [
        found
        for key, value in items
        for found in ((*path, str(key)), *paths(value, (*path, str(key))))
    ]


def spoilt(text: str, rng: random.Random) -> bytes:
    """A configuration's bytes with lines doubled, cut, moved or mixed up, or with other bytes among
    them.
    """
    lines = text.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    match rng.randrange(8):
        case 0:
            lines.insert(rng.randrange(len(lines)), lines[at])
        case 1:
            lines[at] = " " * rng.randrange(1, 5) + lines[at]
        case 2:
            key = lines[at].partition(":")[0]
            lines[at] = f"{key}: {rng.choice(VALUES)}\n"
        case 3:
            del lines[at]
        case 4:
            return text.encode()[: rng.randrange(len(text))]
        case 5:
            lines[at] = lines[at].replace(
                rng.choice(":{}[],- \n"),
                rng.choice(["", "\t", ": ", "{", "]", "#", "'", "&a ", "*a "]),
                1,
            )
        case 6:
            lines.insert(
                at,
                rng.choice(
                    ["---\n", "...\n", "<<: {seed: 1}\n", "? a\n", "\t\n", "- a\n", "%YAML 1.1\n"]
                ),
            )
        case _:
            data = bytearray(text.encode())
            data[rng.randrange(len(data))] = rng.randrange(256)
            return bytes(data)
    return "".join(lines).encode()


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_configuration_ends_in_a_traceback(program: str, tmp_path: Path) -> None:
    kind, text = PROGRAMS[program]
    rng, refused, path = random.Random(program), 0, tmp_path / "c.yaml"
    path.write_text(text)
    written = dump(load(kind, path))
    keys = paths(yaml.safe_load(written))
    for turn in range(INPUTS):
        overrides: tuple[str, ...] = ()
        if turn % 2:
            key = list(rng.choice(keys))
            if rng.random() < 0.2:
                key[rng.randrange(len(key))] = rng.choice(["", "x", "0", "-1", "99", "datasets"])
            overrides = (
                f"{'.'.join(key)}{rng.choice(['=', '=', '=', '=', ''])}{rng.choice(VALUES)}",
            )
        source = written if rng.random() < 0.3 else text
        data = source.encode() if overrides else spoilt(source, rng)
        message = read(path, data, program, *overrides)
        refused += message is not None
        for line in (message or "").splitlines():
            assert line.startswith((str(path), "'", '"', "method.", "rollout.samples")), line
    assert refused >= INPUTS // 3
