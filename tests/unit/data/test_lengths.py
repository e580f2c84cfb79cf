"""Prompts and limits against a model's positions, before work starts, in every program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_efr import algorithms, methods, sft, sweep
from megatron_efr.config import (
    ConfigError,
    EvaluateConfig,
    EvaluationConfig,
    GradingConfig,
    ModelConfig,
    PromptConfig,
    SftConfig,
    TrainConfig,
)
from megatron_efr.data.byte_model import main as write_byte_model
from megatron_efr.data.lengths import check_prompts, check_rows
from megatron_efr.data.prompts import PromptError, load_tokenizer
from megatron_efr.evaluate import evaluate
from megatron_efr.evaluation.evaluator import Evaluator
from megatron_efr.grading import Grader
from megatron_efr.rollout.codec import TokenizerCodec
from megatron_efr.rollout.local.engine import LocalEngine
from megatron_efr.run.main_rank import MainRank
from megatron_efr.types import Marks, Prompt
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import initial_weights


def prompts(*lengths: int) -> list[Prompt]:
    return [Prompt(f"p{n}", (1,) * n, "", "", {"where": f"a.jsonl:{n}"}) for n in lengths]


def test_what_fits_exactly_is_let_through_and_one_token_more_is_not() -> None:
    check_prompts(prompts(3, 12, 5), 88, 100, "rollout.max_new_tokens")
    with pytest.raises(PromptError) as error:
        check_prompts(prompts(3, 12, 5), 89, 100, "rollout.max_new_tokens")
    assert str(error.value) == (
        "rollout.max_new_tokens: 89 tokens after the longest prompt, of 12 (a.jsonl:12), come to "
        "101, and the model has 100 positions (max_position_embeddings in its config.json). What "
        "would fit: rollout.max_new_tokens of at most 88, or prompt.max_tokens of at most 11, "
        "which leaves out 1 of 3 prompts"
    )


@pytest.mark.parametrize(
    ("lengths", "limit", "fits"),
    [
        ((3, 12), 98, "fit: k of at most 88$"),  # no prompt is short enough for that limit
        ((3, 120), 50, "fit: prompt.max_tokens of at most 50, which leaves out 1 of 2 prompts$"),
        ((120,), 200, "fit: prompts of fewer than 100 tokens$"),
    ],
)
def test_only_what_would_fit_is_offered(lengths: tuple[int, ...], limit: int, fits: str) -> None:
    with pytest.raises(PromptError, match=fits):
        check_prompts(prompts(*lengths), limit, 100, "k")


def test_rows_are_counted_and_the_longest_is_named() -> None:
    check_rows([9, 10], ["a:1", "a:2"], 10)
    with pytest.raises(
        PromptError,
        match=r"^a:3: prompt and response have 30 tokens, .* 10 positions .*; 2 of 3 rows",
    ):
        check_rows([11, 10, 30], ["a:1", "a:2", "a:3"], 10)


# -- the programs
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 4,096 positions, and problems for it."""
    place = tmp_path_factory.mktemp("lengths")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["byte_model", "--out", str(place / "model")])
        write_byte_model()
    rows = [
        {"question": ("1 + 1 = ?"), "answer": "2"},
        {"question": "1 + " * 300 + "0 = ?", "answer": "300"},
    ]
    (place / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft_rows = [{"question": "Q", "response": "R"}, {"question": "Q", "response": "R" * 5000}]
    (place / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sft_rows))
    return place


def tree(place: Path, **changed: Any) -> dict[str, Any]:
    data = [{"path": str(place / "problems.jsonl")}]
    return {
        "name": "run",
        "runs": str(place / "runs"),
        "model": {"path": str(place / "model"), "init": "random"},
        "data": {"datasets": data, "prompt": {"max_tokens": 4000}},
        "rollout": {"max_new_tokens": 100},
        "optimizer": {"lr": 1e-3},
        "method": {"name": "efr", "alpha": 0.1},
        "evaluation": {"datasets": data, "max_new_tokens": 100, "every": 1},
    } | changed


def how(config: TrainConfig) -> tuple[methods.Method, algorithms.Algorithm, Architecture]:
    method = methods.build(config.method, config.rollout, config.algorithm)
    algorithm = algorithms.build(config.algorithm, config.rollout)
    return method, algorithm, Architecture.from_folder(config.model.path)


@pytest.mark.heavy
def test_a_sweep_says_what_is_wrong_with_all_its_members_before_one_begins(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "side_by_side", lambda *args: pytest.fail("a member was started"))
    (place / "base.yaml").write_text(yaml.safe_dump(tree(place)))
    members = {
        "fine": {"method.alpha": 0.2},
        "long": {"rollout.max_new_tokens": 4000},
        "gone": {"data.datasets.0.path": str(place / "gone.jsonl")},
        "option": {"method": {"name": "laser", "traget": 4}},
        "needs": {
            "algorithm": {"name": "grpo", "baseline": "none"},
            "method": {"name": "dler", "limit": 4000},
        },
    }
    file = {"base": "base.yaml", "name": "family", "members": members, "vary": {"seed": [1, 2]}}
    (place / "family.yaml").write_text(yaml.safe_dump(file, sort_keys=False))
    with pytest.raises(ConfigError) as found:
        sweep.main([str(place / "family.yaml")])
    said = str(found.value).splitlines()
    starts = [
        f"{place}/family.yaml: members {name}_seed-1, {name}_seed-2: "
        for name in members
        if name != "fine"
    ]
    parts = [
        "max_new_tokens: 4000 tokens after",
        "gone.jsonl",
        "method.traget: unknown key; did you mean target",
        "limit",
    ]
    for start, part in zip(starts, parts, strict=True):
        assert any(line.startswith(start) and part in line for line in said), (start, part, said)
    assert len(said) == len(starts), said
    assert not (place / "runs/family").exists()


@pytest.mark.heavy
def test_every_program_refuses_what_is_longer_than_the_model(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = r"problems\.jsonl:2\), come to .* the model has 4096 positions"
    training = TrainConfig.model_validate(tree(place, rollout={"max_new_tokens": 4000}))
    with pytest.raises(PromptError, match=rf"^rollout.max_new_tokens: 4000 tokens after .*{said}"):
        MainRank(training, *how(training))
    held_out = tree(place)
    held_out["evaluation"]["max_new_tokens"] = 4000
    evaluated = TrainConfig.model_validate(held_out)
    with pytest.raises(
        PromptError, match=rf"^evaluation.max_new_tokens: 4000 tokens after .*{said}"
    ):
        MainRank(evaluated, *how(evaluated))
    monkeypatch.setattr(sweep, "side_by_side", lambda *args: pytest.fail("a member was started"))
    (place / "rl.yaml").write_text(yaml.safe_dump(held_out))
    with pytest.raises(
        ConfigError, match=rf"rl.yaml: evaluation.max_new_tokens: 4000 tokens after .*{said}"
    ):
        sweep.main([str(place / "rl.yaml"), "--alphas=0.1"])
    keys = ("name", "runs", "model", "evaluation")
    evaluation = {key: held_out[key] for key in keys} | {"prompt": held_out["data"]["prompt"]}
    with pytest.raises(
        PromptError, match=rf"^evaluation.max_new_tokens: 4000 tokens after .*{said}"
    ):
        evaluate(EvaluateConfig.model_validate(evaluation), "m")
    supervised = {key: held_out[key] for key in ("name", "runs", "model", "optimizer")}
    supervised |= {"data": {"path": str(place / "sft.jsonl")}, "train": {"updates": 1, "batch": 1}}
    with pytest.raises(
        PromptError, match=r"sft\.jsonl:2: prompt and response have 50\d\d tokens.*; 1 of 2 rows"
    ):
        sft.load_rows(
            SftConfig.model_validate(supervised), Architecture.from_folder(place / "model")
        )


@pytest.mark.heavy
def test_an_evaluation_asks_by_its_script_and_refuses_one_that_the_tokenizer_or_the_model_cannot_serve(
    place: Path,
) -> None:
    tokenizer, folder = load_tokenizer(str(place / "model")), str(place / "model")
    codec = TokenizerCodec(tokenizer)

    def evaluator(marks: Marks | None = None, **script: Any) -> Evaluator:
        evaluation = {
            "datasets": [{"path": str(place / "problems.jsonl")}],
            "max_new_tokens": 30,
            "script": script,
        }
        config = EvaluationConfig.model_validate(evaluation)
        return Evaluator(
            config, PromptConfig(max_tokens=4000), GradingConfig(), tokenizer, (), 4096, 0, marks
        )

    with pytest.raises(
        ConfigError, match=r"^evaluation\.script\.end: '</think>' is 8 tokens of this model's"
    ):
        evaluator(name="budget", most=7)
    with pytest.raises(ConfigError, match=r"evaluation\.script\.most"):
        evaluator(name="budget", most=0)
    with pytest.raises(
        ConfigError, match=r"^evaluation\.script\.most: a thought of 30 tokens uses up max_new"
    ):
        evaluator(name="budget", most=30, end="a")
    with pytest.raises(
        PromptError,
        match=r"^evaluation\.max_new_tokens and what evaluation\.script adds: 5030 tokens",
    ):
        evaluator(name="opened", opening="x" * 5000)
    made = evaluator(name="budget", most=7, end="a", cut="ok")
    assert made.asked()["script"] == made.script.model_dump() | {"name": "budget"}
    assert "script" not in evaluator().asked()
    assert evaluator(Marks("", "##")).judged() == evaluator().judged() | {
        "model.thinking.closes": "##"
    }
    engine = LocalEngine(folder, 4, codec=codec)
    model = ModelConfig(path=folder, init="random")
    engine.publish(initial_weights(model, Architecture.from_folder(folder), 0).items(), version=0)
    with Grader.of(GradingConfig(), made.judgings.verifiers) as grader:
        record = made.run(engine, grader, "m")
    assert record["protocol"]["script"] == {"name": "budget", "most": 7, "answer": None, "end": "a",
        "cut": "ok"} | {
        "least": 0, "wait": "Wait", "waits": 1,
    }  # fmt: skip
    (tokens,) = record["rows"][0]["tokens"]
    (text,) = record["rows"][0]["responses"]
    assert tokens == 30
    assert "ok" in text
    made = evaluator(name="forks", at=[0, 4], samples=2, tokens=5, opening="\\boxed{7}")
    with Grader.of(GradingConfig(), made.judgings.verifiers) as grader:
        record = made.run(engine, grader, "m")
    (row, *_) = record["rows"]
    assert row["early"]["at"] == [0, 4]
    assert row["direct"] == [row["direct"][0]] * 2, "both say 7"
    assert record["protocol"]["max_new_tokens"] == 30
    assert record["measures"]["accuracy_within@15"]["value"] == 0.0
