"""Every method trains on the embedded engine, and one that remembers goes on after a kill as if
there had been none.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_efr.config import TrainConfig
from megatron_efr.config.file import validate
from megatron_efr.data.arithmetic import ArithmeticTask, write
from megatron_efr.methods import METHODS
from megatron_efr.observe import deterministic
from megatron_efr.policy.packing import samples
from megatron_efr.run.folder import RunFolder
from megatron_efr.train import train
from megatron_efr.types import Credited, UserError

pytestmark = pytest.mark.heavy

LIMIT = 24
OPTIONS: dict[str, dict[str, Any]] = {
    "l1_exact": {"shortest": 4, "longest": 20, "suffix": "={budget};"},
    "l1_max": {"shortest": 4, "longest": 20, "suffix": "={budget};", "exact_suffix": "+{budget};"},
    "asrr": {"opening": "1+1;", "tau": 0.25},
    "elastic": {"thought": 8, "answer": 6, "end": ";", "cut": "="},
    "lapo": {"second_from": 2, "opening": "{budget};"},
    "autothink": {"opening": "=", "end": ";"},
    "experimental.effort": {"suffix": "={level}"},
    "experimental.target": {"prompts": 6, "monitor_samples": 4, "every": 1},
    "grlc": {"end": ";"},
    "adactrl": {"easy": "1", "hard": "2"},
    "efr": {"alpha": 0.4},
    "grpo_lambda": {"share": 0.5},
    "laser": {"target": 10},
    "laser_d": {"lowest": 2, "step": 2, "monitored": 6, "monitor_samples": 4, "every": 1},
    "adapt_think": {"word": "1", "brief": 8, "reference": 2},
    "experimental.memory_r": {"explore_from": 2, "remembered": 5},
    "experimental.sgpo": {"exits": 3, "answers": 2, "answer_tokens": 3, "end": ";", "stop": "="},
    "experimental.l2t": {"exits": 3, "answers": 2, "answer_tokens": 3, "end": ";", "stop": "="},
    "infty_think": {
        "round_tokens": 24,
        "rounds": 3,
        "opens": " \\boxed{",
        "closes": "}",
        "history": "1+{summary}",
    },
    "thinkless": {"short": "1", "think": "2"},
    "experimental.o1_pruner_online": {"reference": 2},
    "experimental.self_budgeter": {"tag": "{budget};"},
    "laser_de": {"lowest": 2, "step": 2, "monitored": 6, "monitor_samples": 4, "every": 2},
    "da_dler": {"easy": 8, "hard": 16},
    "gfpo": {"keep": 2},
    "gdpo": {"limit": 10},
    "leash": {"target": 8, "rate": 0.5},
    "anytime": {
        "budgets": [4, 10, 20],
        "answers": 2,
        "answer_tokens": 4,
        "end": ";",
        "cut": "=",
        "ended": "=",
    },
    "mrt": {"answers": 2, "answer_tokens": 4, "end": ";", "stop": "="},
    "s_grpo": {"exits": 3, "answer_tokens": 4, "end": ";", "stop": "="},
    "jet": {"answer_tokens": 4, "end": ";", "stop": "="},
    "acoer": {"budget": 16, "least_budget": 4, "warmup": 1, "lookback": 1},
}
"""Options for responses of 24 tokens, of a model that knows digits and a few signs."""
ALWAYS = {"efr", "short_rl", "laser_d", "adapt_think", "anytime"}
BRANCHING = {"anytime", "mrt", "s_grpo", "jet"}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt nothing, and problems of which it gets about half right: any text
    with a low digit.
    """
    folder = tmp_path_factory.mktemp("task")
    write(folder, 0, ArithmeticTask(max_terms=3, train_rows=24, test_rows=4, sft_rows=4))
    rows = [{"question": f"{n} + 1", "answer": "[0-2]"} for n in range(24)]
    (folder / "digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def configured(task: Path, runs: Path, name: str, iterations: int, **changed: Any) -> TrainConfig:
    grading = {"verifier": "regex", "answer": "whole", "options": {"search": True}, "workers": 1}
    tree = {
        "name": name,
        "runs": str(runs),
        "seed": 3,
        "model": {"path": str(task / "model"), "init": "random", "thinking": {"closes": ";"}},
        "data": {
            "datasets": [{"path": str(task / "digits.jsonl")}],
            "prompt": {"template": "{question}"},
        },
        "rollout": {"prompts": 4, "samples": 4, "max_new_tokens": LIMIT},
        "evaluation": {"datasets": [{"path": str(task / "digits.jsonl")}], "max_new_tokens": LIMIT},
        "grading": grading,
        "method": {"name": name, **OPTIONS.get(name, {})},
        "algorithm": {"aggregate": METHODS[name].needs.aggregate or "sequence"},
        "optimizer": {"lr": 1e-3},
        "train": {"iterations": iterations, "updates": 1},
        "checkpoint": {"every": 2},
        "observe": {"tensorboard": False},
    }
    return validate(TrainConfig, tree | changed, "test.yaml")


def lines(runs: Path, name: str) -> list[dict[str, Any]]:
    return [deterministic(line) for line in RunFolder(runs / name).read_metrics()]


@pytest.mark.parametrize(
    "name",
    [
        name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(METHODS)
    ],
)
def test_every_method_trains(name: str, task: Path, tmp_path: Path) -> None:
    iterations = 1 if METHODS[name].needs.offline else 2
    train(configured(task, tmp_path, name, iterations, checkpoint={"every": iterations}))
    made = lines(tmp_path, name)
    steps = [line["step"] for line in made]
    assert steps == list(range(1, iterations + 1))
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in made)
    groups = [group for step in steps for group in RunFolder(tmp_path / name).read_rollouts(step)]
    right = np.concatenate([group.graded.correct & ~group.group.truncated for group in groups])
    assert 0.1 < right.mean() < 0.9, "without both there is nothing to see"
    _check_what_was_asked(name, groups)
    if name in BRANCHING:
        _check_branches(name, groups, made)
    checkpoint = tmp_path / name / f"checkpoints/step_{iterations:06d}"
    state = json.loads((checkpoint / "state.json").read_text())["method"]
    assert len(state["history"]) == 4 * iterations
    assert sum(seen[2] for seen in state["history"].values()) == right.sum()
    if name == "adapt_think":
        kept = (tmp_path / name / "reference.jsonl").read_bytes().splitlines()
        assert len(kept) == 1 + 24, "every prompt, once"
    if name == "laser_d":  # of the new weights, after each iteration
        assert state["monitor"]["step"] == 2
        assert [len(lengths) for lengths, _ in state["monitor"]["sampled"].values()] == [4] * 6
        assert {line["monitor/tokens"] > 0 for line in made} == {True}
        assert [path.name for path in (tmp_path / name / "journal").glob("*")] == [], (
            "the checkpoint covers them"
        )


def _check_branches(name: str, groups: list[Credited], made: list[dict[str, Any]]) -> None:
    """Answers of branches are judged, right and wrong ones, counted, and trained on behind their
    responses.
    """
    answers = [
        answer
        for each in groups
        for response in each.group.responses
        for answer in response.answers
    ]
    verdicts = [
        grade.correct for each in groups for branch in each.graded.branches for grade in branch
    ]
    assert len(answers) == len(verdicts) == sum(line["branches/answers"] for line in made)
    assert 0.1 < np.mean(verdicts) < 0.9
    assert all(0 < line["branches/accuracy"] < 1 for line in made)
    assert all(line["logprob_diff_max"] < 1e-4 for line in made), (
        "the policy reads before an answer what the engine did"
    )
    given = sum(len(advantages) for each in groups for advantages in each.credit.branches or ())
    assert len(samples(groups)) == sum(len(each.group.responses) for each in groups) + given
    assert given == 0 if name == "mrt" else 0 < given <= len(answers)


def _check_what_was_asked(name: str, groups: list[Credited]) -> None:
    """Words of a method to a prompt must be in what the model read, and in its responses."""
    for group in (each.group for each in groups):
        if name in ("l1_exact", "l1_max"):
            assert f"{group.note['budget']};" in group.prompt.text
        opening = {"asrr": "1+1;", "autothink": "="}.get(name)
        if name == "adapt_think":
            assert [response.text[0] for response in group.responses] == [";", ";", "1", "1"]
            assert all(
                response.logprobs[0] == np.float32(np.log(0.5)) for response in group.responses
            )
            assert max(response.length for response in group.responses[:2]) <= 9 < LIMIT
        for response in group.responses:
            assert opening is None or response.text.startswith(opening)
            assert opening is None or response.length == len(response.tokens) - len(opening)
            if name == "elastic":
                assert response.length <= 14
    rounds = [len(response.branches) for each in groups for response in each.group.responses]
    assert name != "infty_think" or {0, 1, 2} >= set(rounds) > {0}
    assert name != "elastic" or any(
        part.ending == "forced"
        for each in groups
        for response in each.group.responses
        for part in response.parts
    )


JUDGED = {"name": "experimental.sgpo", "judge": "tests.judged:early_steps", "step": "1", "end": ";"}
LATER = {"name": "experimental.adacot", "masked_from": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changed"),
    [
        *(
            (name, {})
            for name in (
                "hapo",
                "short_rl",
                "leash",
                "acoer",
                "lapo",
                "laser_d",
                "experimental.memory_r",
            )
        ),
        ("experimental.sgpo", {"method": JUDGED}),
        ("experimental.adacot", {"method": LATER}),
    ],
)
def test_a_method_that_remembers_goes_on_as_if_there_had_been_no_kill(
    name: str, changed: dict[str, Any], task: Path, tmp_path: Path
) -> None:
    """Two visits of every prompt; the checkpoint is of the first, and the history of prompts must
    come from it.
    """
    few = {"path": str(task / "few.jsonl")}
    (task / "few.jsonl").write_text(
        "".join((task / "digits.jsonl").read_text().splitlines(True)[:8])
    )
    changed = changed | {"data": {"datasets": [few], "prompt": {"template": "{question}"}}}
    train(configured(task, tmp_path / "whole", name, 4, **changed))
    cut, changed = tmp_path / "cut" / name, changed | {"checkpoint": {"every": 2, "keep": 2}}
    train(configured(task, tmp_path / "cut", name, 4, **changed))
    # what a kill in iteration 3 leaves: the checkpoint of iteration 2, and nothing later
    shutil.rmtree(cut / "checkpoints/step_000004")
    (cut / "checkpoints/latest").write_text("step_000002")
    assert json.loads((cut / "checkpoints/step_000002/state.json").read_text())["method"]["history"]
    train(configured(task, tmp_path / "cut", name, 4, **changed), resume=True)
    assert lines(tmp_path / "cut", name) == lines(tmp_path / "whole", name)
    ends = [
        json.loads((tmp_path / run / name / "checkpoints/step_000004/state.json").read_text())
        for run in ("whole", "cut")
    ]
    assert ends[0]["method"] == ends[1]["method"]
    groups = [
        group
        for step in (2, 3)
        for group in RunFolder(tmp_path / "whole" / name).read_rollouts(step)
    ]
    if name == "experimental.sgpo":
        lost = [group.rewarded.rewards for group in groups if not group.graded.correct.any()]
        assert any(np.ptp(rewards) > 0 for rewards in lost), "the judge tells wrong responses apart"
    if name == "experimental.adacot":
        firsts = [[weight[0] for weight in group.credit.weight or ()] for group in groups]
        assert firsts == [[]] * 4 + [[0.0] * 4] * 4, "masked from the third iteration on"


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["filtered_sft", "filtered_sft_negatives"])
def test_filtered_sft_trains_on_what_passes(algorithm: str, task: Path, tmp_path: Path) -> None:
    plain = {"name": "efr", "alpha": 0}
    train(configured(task, tmp_path, "efr", 2, method=plain, algorithm={"name": algorithm}))
    made = lines(tmp_path, "efr")
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in made)
    credits = [
        (g.rewarded.rewards > 0, g.credit)
        for step in (1, 2)
        for g in RunFolder(tmp_path / "efr").read_rollouts(step)
    ]
    assert {bool(passes) for right, _ in credits for passes in right} == {True, False}
    for right, credit in credits:
        others = 0.0 if algorithm == "filtered_sft" else -1.0
        assert credit.advantage.tolist() == np.where(right, 1.0, others).tolist()
        left_out = ~right if algorithm == "filtered_sft" else np.zeros(4, dtype=bool)
        assert credit.masked is not None
        assert credit.masked.tolist() == left_out.tolist()


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_samples_the_starting_model_goes_on(
    task: Path, tmp_path: Path
) -> None:
    """Its numbers are the whole run's, and so are those of a run that reads the whole one's
    file.
    """
    name = "adapt_think"
    train(configured(task, tmp_path / "whole", name, 2))
    expected, kept = lines(tmp_path / "whole", name), tmp_path / "whole" / name / "reference.jsonl"
    cut, data = tmp_path / "cut" / name, kept.read_bytes()
    cut.mkdir(parents=True)
    tree = (tmp_path / "whole" / name / "config.yaml").read_text()
    (cut / "config.yaml").write_text(tree.replace(str(tmp_path / "whole"), str(tmp_path / "cut")))
    (cut / "reference.jsonl").write_bytes(data[: len(data) // 2])  # in the middle of a line
    with pytest.raises(
        UserError, match="this run, with the same configuration, has been started before"
    ):
        train(configured(task, tmp_path / "cut", name, 2))
    train(configured(task, tmp_path / "cut", name, 2), resume=True)
    assert lines(tmp_path / "cut", name) == expected
    assert sorted((cut / "reference.jsonl").read_bytes().splitlines()) == sorted(data.splitlines())
    shared = {
        "datasets": [{"path": str(task / "digits.jsonl")}],
        "prompt": {"template": "{question}"},
    }
    shared["reference"] = str(kept)
    train(configured(task, tmp_path / "reads", name, 2, data=shared))
    assert lines(tmp_path / "reads", name) == expected
    assert (tmp_path / "reads" / name / "reference.jsonl").read_bytes() == data, (
        "its own, for when it is resumed"
    )
    # other random weights
    other = configured(task, tmp_path / "other", name, 2, data=shared, seed=4)
    with pytest.raises(UserError, match="these responses were sampled otherwise: model: there"):
        train(other)
