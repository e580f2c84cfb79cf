"""Additions of a method to its prompts: in a run's request, and refused at the start."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_efr import algorithms, methods
from megatron_efr.config import ConfigError, TrainConfig
from megatron_efr.config.file import validate
from megatron_efr.data.arithmetic import ArithmeticTask, write
from megatron_efr.data.prompts import load_tokenizer
from megatron_efr.data.stream import PromptStream
from megatron_efr.evaluation.problems import load_prompts
from megatron_efr.methods import Ask
from megatron_efr.rollout.codec import KEPT, TokenizerCodec
from megatron_efr.rollout.request_json import decode_request, encode_request
from megatron_efr.run.asking import Asking
from megatron_efr.run.main_rank import MainRank
from megatron_efr.scripts import Opened, Plain
from megatron_efr.scripts.published import Tip
from megatron_efr.scripts.search import VgSearch
from megatron_efr.types import Prompt
from megatron_efr.weights.architecture import Architecture
from tests.groups import KNOWN


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    write(folder, 0, ArithmeticTask(max_terms=2, train_rows=4, test_rows=2, sft_rows=2))
    return folder


def asking(task: Path, **method: Any) -> tuple[Asking, list[Prompt], TokenizerCodec]:
    tree = {
        "name": "run",
        "model": {"path": str(task / "model"), "init": "random"},
        "data": {
            "datasets": [{"path": str(task / "train.jsonl")}],
            "prompt": {"template": "{question}"},
        },
        "rollout": {"prompts": 2, "samples": 3, "max_new_tokens": 24},
        "optimizer": {"lr": 1e-3},
        "method": method,
    }
    config = validate(TrainConfig, tree, "test.yaml")
    tokenizer = load_tokenizer(config.model.path)
    prompts = load_prompts(config.data.datasets, tokenizer, config.data.prompt).prompts
    made = methods.build(config.method, config.rollout, config.algorithm)
    return Asking(config, made, tokenizer, lambda: KNOWN), prompts, TokenizerCodec(tokenizer)


def test_a_plain_method_asks_prompts_as_they_are(task: Path) -> None:
    made, prompts, codec = asking(task, name="efr", alpha=0.1)
    made.check(prompts, codec, 10_000)
    visit = PromptStream(prompts, 0).take(1)[0]
    request = made.request(visit)
    assert request.prompt is visit.prompt
    assert request.scripts == (Plain(),) * 3
    assert request.note == {}


def test_a_budget_is_in_the_prompt_that_the_model_reads(task: Path) -> None:
    made, prompts, codec = asking(
        task, name="l1_exact", shortest=5, longest=20, suffix="={budget};"
    )
    made.check(prompts, codec, 10_000)
    stream = PromptStream(prompts, 0)
    requests = [made.request(visit) for visit in stream.take(8)]
    assert len({request.note["budget"] for request in requests}) > 1
    for request in requests:
        question = request.prompt.meta["question"]
        assert request.prompt.text == f"<bos><user>{question}={request.note['budget']};<assistant>"
        assert codec.decode(request.prompt.tokens) == f"{question}={request.note['budget']};"
        assert decode_request(encode_request(request)) == request, (
            "it is journalled, and comes back"
        )
    assert [made.request(stream.visit(index)) for index in range(8)] == requests


FEW = {"thought": 8, "answer": 8}
"""Budgets that fit into a response of 24 tokens."""


@pytest.mark.parametrize(
    ("method", "positions", "message"),
    [
        (
            {"name": "elastic", "end": "12", **FEW},
            999,
            r"^method\.end: '12' is 2 tokens of this model's tokenizer",
        ),
        (
            {"name": "asrr", "opening": "1234;"},
            40,
            r"^rollout\.max_new_tokens: 24 tokens after the longest prompt \(.*, which is \d+ tokens with what method "
            r"asrr adds, come to \d+, and the model has 40 positions; at most \d+ would fit",
        ),
        # later on: in the second stage, or a seldom suffix
        (
            {"name": "lapo", "second_from": 9, "opening": "={budget};"},
            42,
            r"^rollout.* is 19 tokens with",
        ),
        (
            {
                "name": "l1_max",
                "exact": 0.001,
                "longest": 20,
                "shortest": 2,
                "suffix": "{budget}",
                "exact_suffix": "1+1+1+1+1+1+1+1+1+1+1={budget}",
            },
            45,
            "^rollout.max_new_tokens: ",
        ),
        (
            {"name": "grlc"},
            999,
            r"^method\.end: '</think>' would never be found in a response: .* reads ''",
        ),
        (
            {"name": "autothink", "opening": "1"},
            999,
            r"^method\.end: '</think>' would never be found",
        ),
        ({"name": "adactrl", "easy": "1"}, 999, r"^method\.hard: '\[Hard\]' would never be found"),
    ],
)
def test_what_cannot_be_asked_is_refused_at_the_start(
    task: Path, method: dict[str, Any], positions: int, message: str
) -> None:
    made, prompts, codec = asking(task, **method)
    with pytest.raises(ConfigError, match=message):
        made.check([Prompt("p", (1,) * 12, "q", "1", prompts[0].meta)], codec, positions)


def test_the_tokens_of_a_runs_many_summaries_are_not_all_kept(task: Path) -> None:
    _, _, codec = asking(task, name="efr", alpha=0.1)
    for number in range(KEPT + 44):
        assert codec.decode(codec.encode(f"{number}")) == f"{number}"
    assert codec.encode.cache_info().currsize == KEPT


def test_a_script_for_each_response_or_none(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Single(methods.EFR):
        def ask(self, visit: methods.Visit, known: methods.Known) -> Ask:
            return Ask(scripts=(Opened(opening="1"),))

    monkeypatch.setitem(methods.METHODS, "single", Single)
    made, prompts, codec = asking(task, name="single", alpha=0.1)
    with pytest.raises(ConfigError, match=r"^method\.name: single gave 1 scripts for 3 responses"):
        made.check(prompts, codec, 999)


def test_training_refuses_scripts_that_are_for_evaluations_by_their_names(
    task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, prompts, codec = asking(task, name="efr", alpha=0.1)
    for script in (Tip(switch=("1",)), VgSearch(ends=("1",))):
        monkeypatch.setattr(
            type(made._method), "ask", lambda *_, script=script: Ask(scripts=(script,) * 3)
        )
        with pytest.raises(
            ConfigError,
            match=rf"^method\.name: efr asks with {type(script).__name__}, a script for",
        ):
            made.check(prompts, codec, 10_000)


def test_a_run_on_servers_refuses_to_evaluate_with_a_penalty(task: Path) -> None:
    made, _, _ = asking(task, name="efr", alpha=0.1)
    tree = made._config.model_dump(mode="json", by_alias=True)
    tree["evaluation"] |= {
        "datasets": [{"path": str(task / "test.jsonl")}], "every": 1, "max_new_tokens": 8,
        "script": {"name": "tip", "switch": ["1"]},
    }  # fmt: skip
    for engine in ("local", "sglang"):
        config = validate(TrainConfig, tree | {"rollout": {**tree["rollout"], "engine": engine}})
        algorithm = algorithms.build(config.algorithm, config.rollout)
        build = partial(
            MainRank, config, made._method, algorithm, Architecture.from_folder(task / "model")
        )
        if engine == "local":
            build().close()
        else:
            with pytest.raises(
                ConfigError,
                match=r"^evaluation\.script\.name: tip penalises tokens, and the servers",
            ):
                build()


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("short", {"name": "thinkless", "short": "11", "think": "2"}),
        ("word", {"name": "adapt_think", "word": "11"}),
    ],
)
def test_a_text_that_must_be_one_token_is_refused_if_it_is_more(
    task: Path, key: str, options: dict[str, Any]
) -> None:
    made, prompts, codec = asking(task, **options)
    with pytest.raises(
        ConfigError,
        match=rf"^method\.{key}: '11' is 2 tokens .* method {options['name']} needs a single",
    ):
        made.check(prompts, codec, 10_000)
    made, prompts, codec = asking(task, **options | {key: "1"})
    made.check(prompts, codec, 10_000)
