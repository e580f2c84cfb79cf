"""Bad input: each stops its program with exit code 2 and one message that a person can act on,
before work starts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_efr import arguments, evaluate, sft, sweep, train
from megatron_efr.data.arithmetic import ArithmeticTask, write
from megatron_efr.offline import loop
from megatron_efr.policy import Ranks, policy
from megatron_efr.rollout.local.engine import LocalEngine
from megatron_efr.run import owner, run
from megatron_efr.run.folder import RunFolder
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import RandomWeights, save_folder

pytestmark = pytest.mark.alike

PROGRAMS = {"train": train, "sft": sft, "evaluate": evaluate, "sweep": sweep}
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    write(folder, 0, ArithmeticTask(max_terms=3, train_rows=16, test_rows=8, sft_rows=16))
    return folder


def configuration(program: str, task: Path) -> dict[str, Any]:
    """A configuration of `program` that nothing is wrong with."""
    prompt = {"template": "{question}"}
    common: dict[str, Any] = {
        "name": "run",
        "model": {"path": str(task / "model"), "init": "random"},
    }
    rows = {"path": str(task / "test.jsonl")}
    if program == "sft":
        data = {"path": str(task / "sft.jsonl")}
        return common | {
            "data": data,
            "prompt": prompt,
            "optimizer": {"lr": 1e-3},
            "train": {"updates": 1, "batch": 8},
        }
    if program == "evaluate":
        return common | {"prompt": prompt, "evaluation": {"datasets": [rows], "max_new_tokens": 8}}
    return common | {
        "data": {"datasets": [{"path": str(task / "train.jsonl")}], "prompt": prompt},
        "rollout": {"prompts": 4, "samples": 4, "max_new_tokens": 8},
        "method": {"name": "efr", "alpha": 0.1},
        "optimizer": {"lr": 1e-3},
        "evaluation": {"datasets": [rows], "max_new_tokens": 8},
        "observe": {"tensorboard": False},
    }


class WorkError(AssertionError):
    """The program went to work on input that it should have refused."""


@pytest.fixture
def refused(
    task: Path,
    ranks: Ranks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Refused:
    """Runs `program` with overrides, in this process and its world of one; returns what it printed
    as its error.

    No model may be built (with `before="update"`: no update made) and no token generated; with
    `joining=False`, not even the ranks may be joined.
    """

    def work(*_arguments: object, **_named: object) -> None:
        raise WorkError

    def refuse(program: str, *overrides: str, joining: bool = True, before: str = "model") -> str:
        @contextmanager
        def join(*_: object) -> Iterator[Ranks]:
            assert joining, "the ranks were joined"
            yield ranks

        for module in (run, loop):
            monkeypatch.setattr(module, "join_ranks", join)
        monkeypatch.setattr(LocalEngine, "publish", work)
        monkeypatch.setattr(sweep, "side_by_side", work)
        monkeypatch.setattr(
            *((policy, "build_chunks") if before == "model" else (policy.Policy, "update")), work
        )
        path = tmp_path / f"{program}.yaml"
        path.write_text(yaml.safe_dump(configuration(program, task)))
        options = [text for text in overrides if text.startswith("--")]
        values = [
            f"runs={tmp_path / 'runs'}",
            *(text for text in overrides if not text.startswith("--")),
        ]
        with pytest.raises(SystemExit) as ended:
            arguments.run(PROGRAMS[program].main, [str(path), *values, *options])
        assert ended.value.code == 2
        said = capsys.readouterr().err.splitlines(keepends=True)
        message = "".join(
            line for line in said if not re.match(r"\d\d:\d\d:\d\d rank 0 INFO \[start\] ", line)
        )
        assert message.startswith("error: ")
        return message

    return refuse


@pytest.mark.parametrize("program", ["train", "sft", "evaluate"])
def test_nothing_is_wrong_with_the_configurations_that_are_spoilt_below(
    program: str, refused: Refused
) -> None:
    with pytest.raises(WorkError):
        refused(program)


@pytest.mark.parametrize(
    ("program", "overrides", "parts"),
    [
        (
            "train",
            ["rollout.sampels=4"],
            ["train.yaml: rollout.sampels: unknown key; did you mean samples"],
        ),
        ("train", ["method.alhpa=0.1"], ["method.alhpa: unknown key; did you mean alpha"]),
        ("train", ["rollout.samples=four"], ["rollout.samples", "valid integer", "'four'"]),
        ("train", ["method.alpha=1.0"], ["method.alpha", "less than 1", "1.0"]),
        ("train", ["method.alpha=-0.1"], ["method.alpha", "greater than or equal to 0", "-0.1"]),
        ("train", ["method.alpha=.nan"], ["method.alpha", "finite number", "nan"]),
        ("train", ["method.alpha=high"], ["method.alpha", "valid number", "'high'"]),
        (
            "train",
            ["method={name: gdpo, limit: 4}", "algorithm.name=dapo"],
            [
                "algorithm.dynamic_sampling: true throws away",
                "train.yaml: algorithm.truncated: soft",
                "truncated: wrong",
            ],
        ),
        ("train", ["method.name=grpo"], ["method.name: no method 'grpo'; there are ", "efr"]),
        (
            "train",
            ["rollout.samples=1"],
            ["rollout.samples: 1 response(s) per prompt", "at least 2"],
        ),
        (
            "train",
            ["train.updates=3"],
            ["4 x 4 = 16 responses do not split over train.updates = 3"],
        ),
        ("train", ["rollout.samples"], ["'rollout.samples': an override reads section.key=value"]),
        ("train", ["data.datasets.3.path=x"], ["3 is not a place in that list"]),
        (
            "train",
            ["data.prompt.template=nothing"],
            ["train.yaml: data.prompt.template: leaves the question out", "'nothing'"],
        ),
        (
            "sft",
            ["prompt.template='{question} {answer}'"],
            ["sft.yaml: prompt.template: {answer} is no field"],
        ),
        (
            "train",
            ["optimizer.min_lr=1"],
            ["train.yaml: optimizer.min_lr: 1 is above optimizer.lr = 0.001"],
        ),
        (
            "train",
            ["model.megatron={num_layerz: 2}"],
            ["train.yaml: model.megatron.num_layerz: TransformerConfig of"],
        ),
        ("sft", ["model.megatron={num_layerz: 2}"], ["did you mean num_layers?"]),
        (
            "sft",
            ["model.megatron={hidden_dropout: '0'}"],
            ["sft.yaml: model.megatron.hidden_dropout", "float, not '0'"],
        ),
        (
            "sft",
            ["model.megatron={normalization: Layer}"],
            ["model.megatron.normalization", "'LayerNorm', 'RMSNorm'"],
        ),
        (
            "train",
            ["model.megatron={activation_func: gelu}"],
            ["model.megatron.activation_func", "Callable", "not 'gelu'"],
        ),
        (
            "train",
            ["model.megatron={params_dtype: bfloat16}"],
            ["model.megatron.params_dtype", "dtype, not 'bfloat16'"],
        ),
        (
            "train",
            ["model.megatron={attention_backend: fast}"],
            ["one of flash, fused, unfused, local, auto, not 'fast'"],
        ),
        (
            "train",
            ["model.megatron={recompute_granularity: full}"],
            ["model.megatron: TransformerConfig of", "recompute"],
        ),
        (
            "train",
            ["parallel.ddp={overlap: true}"],
            [
                "parallel.ddp.overlap: DistributedDataParallelConfig of megatron-core has no such "
                "field; did you mean"
            ],
        ),
        (
            "sft",
            ["parallel.ddp={bucket_size: many}"],
            ["parallel.ddp.bucket_size", "Optional[int], not 'many'"],
        ),
        (
            "train",
            ["optimizer.megatron={adam: 1}"],
            ["optimizer.megatron.adam: OptimizerConfig of megatron-core has no"],
        ),
        (
            "train",
            ["optimizer.megatron={adam_beta1: [1]}"],
            ["optimizer.megatron.adam_beta1", "float, not [1]"],
        ),
        (
            "train",
            ["optimizer.megatron={min_loss_scale: .nan}"],
            ["optimizer.megatron.min_loss_scale", "float, not nan"],
        ),
        ("train", ["evaluation.temperature=0.7"], ["evaluation: preset paper fixes temperature"]),
        ("sft", ["train.batch=0"], ["train.batch", "greater than 0", "0"]),
        ("sft", ["parallel.tensor=2"], ["parallel: tensor 2", "1 launched ranks"]),
        ("evaluate", ["--record=a/b"], ["evaluation name 'a/b': a file name without '/'"]),
        ("sweep", ["--alphas=0,1.5"], ["method.alpha", "1.5"]),
        ("sweep", ["--alphas=0,x"], ["--alphas '0,x'"]),
        ("sweep", ["--alphas=0.1,0.10"], ["--alphas: 0.1, 0.1: each value once"]),
        (
            "sweep",
            ["--alphas=0", "--jobs=2", "rollout.engine=sglang", "rollout.urls=[http://a:1]"],
            ["--jobs 2 with rollout.urls", "--jobs 1, or leave urls out"],
        ),
        ("sweep", ["--alphas=0", "--ranks=3"], ["8 responses per update", "a multiple of 3"]),
        (
            "sweep",
            ["--alphas=0", "evaluation.datasets=[]"],
            ["evaluation.datasets: a sweep evaluates every model"],
        ),
    ],
)
def test_what_the_configuration_alone_shows_is_refused_before_the_ranks_join(
    program: str, overrides: list[str], parts: list[str], refused: Refused
) -> None:
    message = refused(program, *overrides, joining=False)
    assert [part for part in parts if part not in message] == [], message


def spoilt_folder(task: Path, tmp_path: Path, change: Callable[[Path], None]) -> str:
    """model.path=... of a copy of the model folder that `change` was done to."""
    folder = tmp_path / "spoilt"
    shutil.copytree(task / "model", folder)
    change(folder)
    return f"model.path={folder}"


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize("program", ["train", "sft", "evaluate"])
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (shutil.rmtree, ["spoilt: no such", "folder"]),
        (
            lambda folder: (folder / "config.json").unlink(),
            ["spoilt/config.json: no", "model folder"],
        ),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            ["spoilt/config.json: not valid JSON"],
        ),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            ["spoilt: no tokenizer here (expected tokenizer.json"],
        ),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{}"),
            ["the tokenizer's files cannot be loaded"],
        ),
        (edit(vocab_size=20), ["vocabulary mismatch", "vocab_size is 20"]),
        (
            edit(model_type="gemma"),
            ["spoilt/config.json: model_type 'gemma' is not supported; supported: qwen2"],
        ),
        (edit(use_sliding_window=True), ["use_sliding_window True is not supported"]),
        (
            edit(rope_parameters={"rope_type": "dynamic"}),
            ["rope_parameters.rope_type: 'dynamic' is not supported"],
        ),
        (edit(hidden_size=None), ["hidden_size: an integer is required, found None"]),
    ],
)
def test_a_model_folder_that_cannot_be_used(
    program: str,
    change: Callable[[Path], None],
    parts: list[str],
    task: Path,
    tmp_path: Path,
    refused: Refused,
) -> None:
    message = refused(program, spoilt_folder(task, tmp_path, change))
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize("program", ["train", "sft", "evaluate"])
def test_weights_that_are_not_there(program: str, task: Path, refused: Refused) -> None:
    message = refused(program, "model.init=load")
    assert (
        f"{task / 'model'}: neither model.safetensors nor model.safetensors.index.json found"
    ) in message
    assert "set model.init: random" in message


@pytest.mark.parametrize("program", ["train", "sft", "evaluate"])
def test_a_head_of_its_own_where_config_json_ties_it(
    program: str, task: Path, tmp_path: Path, refused: Refused
) -> None:
    weights = dict(RandomWeights(Architecture.from_folder(task / "model"), seed=0).items())
    head = weights["model.embed_tokens.weight"] * 1.01
    save_folder(tmp_path / "own", [*weights.items(), ("lm_head.weight", head)], task / "model")
    message = refused(program, "model.init=load", f"model.path={tmp_path / 'own'}")
    assert (
        "own/model.safetensors: lm_head.weight is not model.embed_tokens.weight, and config.json "
        "says"
    ) in message


GOOD = '{"question": "1+1", "answer": "2"}\n'


@pytest.mark.parametrize("program", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (None, ["rows.jsonl: ", "no such"]),
        ("", ["rows.jsonl: holds no rows"]),
        (
            GOOD + '{"question": "1+2"}\n',
            ["rows.jsonl:2: no answer", "the row has columns question"],
        ),
        (
            GOOD + GOOD + '{"question": "1+2", "answer": ""}\n',
            ["rows.jsonl:3: the answer in column 'answer' is empty"],
        ),
        (
            GOOD + '{"question": "1+2", "answer": "???"}\n',
            ["rows.jsonl:2: '???': is a note about an answer"],
        ),
        (GOOD + '{"question": "1+2", "answer"\n', ["rows.jsonl:2: not valid JSON"]),
        ("\xff".encode("latin-1"), ["rows.jsonl:1: cannot be read: not UTF-8"]),
    ],
)
def test_a_data_set_that_cannot_be_used(
    program: str, rows: str | bytes | None, parts: list[str], tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / "rows.jsonl"
    if rows is not None:
        path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    section = "data" if program == "train" else "evaluation"
    message = refused(program, f"{section}.datasets.0.path={path}")
    assert [part for part in parts if part not in message] == [], message


def test_a_row_without_a_response_cannot_be_learnt_from(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "1+1", "response": "2"}\n{"question": "1+2", "answer": "3"}\n')
    message = refused("sft", f"data.path={path}")
    assert (
        f"{path}:2: no text in column 'response'; the row has columns question, answer"
    ) in message


@pytest.mark.parametrize("program", ["train", "evaluate", "sft"])
def test_prompts_over_the_limit_are_counted_or_refused(
    program: str, tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    path, prompt = tmp_path / "rows.jsonl", "data.prompt" if program == "train" else "prompt"
    short = '{"question": "1+1", "answer": "2", "response": "2"}\n'
    path.write_text(short * 8 + '{"question": "1+1+1+1+1", "answer": "5", "response": "5"}\n')
    where = {
        "train": "data.datasets.0.path",
        "evaluate": "evaluation.datasets.0.path",
        "sft": "data.path",
    }[program]
    given = [f"{where}={path}", f"{prompt}.max_tokens=7"]
    message = refused(program, *given, f"{prompt}.overlong=error")
    assert f"{path}:9: the prompt has 12 tokens, more than prompt.max_tokens = 7" in message
    with pytest.raises(WorkError):  # skipped: the program goes on, and has said so
        refused(program, *given)
    said = {"sft": "8 rows to train on, 1 left out: prompt too long"}
    assert (
        said.get(program, "1 prompts are longer than prompt.max_tokens and were left out")
        in capsys.readouterr().out
    )
    assert "prompts are longer than" in refused(program, given[0], f"{prompt}.max_tokens=2")


@pytest.mark.parametrize(
    ("program", "overrides", "parts"),
    [
        ("train", ["evaluation.every=1", "evaluation.datasets=[]"], ["evaluation.datasets: empty"]),
        ("evaluate", ["evaluation.datasets=[]"], ["evaluation.datasets: empty"]),
        (
            "evaluate",
            ["evaluation.samples_by_dataset={tset: 2}"],
            ["evaluation.samples_by_dataset.tset: no such data set; there are test"],
        ),
        (
            "evaluate",
            ["rollout.python=absent", "--engine=sglang"],
            ["rollout.python: absent: no such interpreter"],
        ),
        ("sft", ["train.batch=64"], ["sft.jsonl: 16 rows, and train.batch takes 64"]),
    ],
)
def test_what_does_not_fit_together_is_refused_before_a_model_is_built(
    program: str, overrides: list[str], parts: list[str], refused: Refused
) -> None:
    message = refused(program, *overrides)
    assert [part for part in parts if part not in message] == [], message


def test_a_run_folder_that_holds_another_configuration(
    task: Path, tmp_path: Path, refused: Refused
) -> None:
    with pytest.raises(WorkError):
        refused("train")
    folder = RunFolder(tmp_path / "runs/run")
    folder.append_metrics(1, {"accuracy": 0.5})
    for more in ([], ["--resume"]):
        message = refused("train", "method.alpha=0.4", *more)
        assert f"{folder.path}: already holds another configuration" in message
        assert "method.alpha: there 0.1, here 0.4" in message
    assert "pass --resume" in refused("train")


@pytest.mark.parametrize("program", ["train", "sft", "evaluate", "sweep"])
def test_a_folder_or_record_that_another_process_works_on(
    program: str, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "WAIT_S", 0.1)
    folder = RunFolder(tmp_path / "runs/run")
    lock = folder.evaluation_lock("model") if program == "evaluate" else folder.lock
    with owner.owned(lock, "it"):
        message = refused(program, *(["--alphas=0.1"] if program == "sweep" else []))
    what = f"{folder.path}: evaluation model" if program == "evaluate" else f"{folder.path}"
    assert message.startswith(
        f"error: {what}: is being worked on by process {os.getpid()} on host "
    )
    assert not folder.config.exists()


def test_a_mistake_put_right_does_not_leave_the_folder_to_the_mistaken_configuration(
    tmp_path: Path, refused: Refused
) -> None:
    refused("train", f"data.datasets.0.path={tmp_path / 'absent.jsonl'}")
    with pytest.raises(WorkError):
        refused("train")
