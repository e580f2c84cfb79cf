"""The quickstart's RL iteration, rollouts to published weights, gives one process's numbers in
every layout.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_efr.data.arithmetic import ArithmeticTask, write
from megatron_efr.data.model_folder import ModelSize
from megatron_efr.observe import deterministic
from megatron_efr.run.folder import RunFolder
from tests.loop.conftest import install_method
from tests.parallel.launch import run_ranks
from tests.parallel.layout import folder

pytestmark = pytest.mark.parallel

ROOT = Path(__file__).parents[2]
DENSE = {
    2: ["tensor=2", "pipeline=2", "context=2", "pipeline=2,virtual_pipeline=2", ""],
    4: ["tensor=2,pipeline=2", "tensor=2"],  # the latter with data parallelism
}
EXPERTS = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The quickstart's RL configuration made small, for its model and for one with experts.

    A model that has learnt nothing earns nothing from the paper's method, so one is taken that
    rewards lengths.
    """
    place = tmp_path_factory.mktemp("iteration")
    write(
        place, 0, ArithmeticTask(train_rows=24, test_rows=4, sft_rows=4, model=ModelSize(layers=4))
    )
    shutil.copytree(place / "model", place / "experts")
    dense = json.loads((place / "model/config.json").read_text())
    (place / "experts/config.json").write_text(json.dumps(dense | EXPERTS))
    tree: dict[str, Any] = yaml.safe_load((ROOT / "examples/quickstart/rl.yaml").read_text())
    tree["data"]["datasets"][0]["path"] = str(place / "train.jsonl")
    tree["rollout"] = {"prompts": 4, "samples": 4, "max_new_tokens": 24}
    tree["method"] = {"name": "typical"}
    tree["algorithm"]["beta"] = 0.1  # so that the KL to the initial model is felt
    tree["optimizer"]["lr"] = 3e-3
    tree["train"] |= {"iterations": 2, "micro_batch_tokens": 100}
    made = {}
    for name, model in (("dense", "model"), ("experts", "experts")):
        tree["model"] = {"path": str(place / model), "init": "random"}
        made[name] = place / f"{name}.yaml"
        made[name].write_text(yaml.safe_dump(tree))
    return made


def run(runs: Path, asked: list[str], processes: int) -> None:
    """Start the ranks once; they train in one layout after the other."""
    install_method(runs)
    run_ranks(processes, "tests.parallel.programs", "train", runs, *asked, path=runs)


@pytest.fixture(scope="module")
def one(configs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("one")
    run(runs, [f"{configs['dense']} ", f"{configs['experts']} expert=1"], 1)
    return runs


@pytest.fixture(scope="module")
def two(configs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("two")
    run(
        runs,
        [
            *(f"{configs['dense']} {layout}" for layout in DENSE[2]),
            f"{configs['experts']} expert=2",
        ],
        2,
    )
    return runs


@pytest.fixture(scope="module")
def four(configs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("four")
    run(runs, [f"{configs['dense']} {layout}" for layout in DENSE[4]], 4)
    return runs


def measured(runs: Path, layout: str) -> list[dict[str, Any]]:
    """Every deterministic metric of each iteration, but the split's own."""
    lines = RunFolder(runs / folder(layout)).read_metrics()
    return [
        {key: value for key, value in deterministic(line).items() if key != "imbalance"}
        for line in lines
    ]


def assert_same(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Samples agree to the last token, and what was computed from them to 1e-5."""
    assert len(found) == len(wanted) == 2
    for mine, theirs in zip(found, wanted, strict=True):
        for key in ("tokens_total", "tokens_max", "accuracy", "reward_mean", "truncated"):
            assert mine[key] == theirs[key], key
        for key in ("loss", "kl", "grad_norm", "kl_to_old"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-7), key
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():  # null is the mean of nothing: no response was right
            assert mine[key] == (
                value if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)
            ), key
        assert mine["first_ratio_max"] == pytest.approx(1, abs=1e-6)


def test_one_process_learns_something_to_compare(one: Path) -> None:
    for layout in ("", "expert=1"):
        first, second = measured(one, layout)
        assert first["kl"] == 0
        assert abs(second["kl"]) > 1e-3
        assert min(first["grad_norm"], second["grad_norm"]) > 0.01
        assert first["tokens_total"] > 150


@pytest.mark.parametrize("layout", DENSE[2])
def test_two_ranks(layout: str, two: Path, one: Path) -> None:
    assert_same(measured(two, layout), measured(one, ""))


@pytest.mark.parametrize("layout", DENSE[4])
def test_four_ranks(layout: str, four: Path, one: Path) -> None:
    assert_same(measured(four, layout), measured(one, ""))


def test_two_ranks_that_share_experts(two: Path, one: Path) -> None:
    assert_same(measured(two, "expert=2"), measured(one, "expert=1"))


SCRIPTED = {
    "branches": {
        "name": "forks",
        "at": [2, 6, 12],
        "samples": 2,
        "tokens": 4,
        "opening": "=",
        "end": ";",
    },
    "chosen": {"name": "opened", "opening": "1+", "chance": 0.25},
}
"""Scripts whose answers are samples of their own, and whose first tokens have a ratio to their
chance.
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCRIPTED)
def test_scripts_are_trained_alike_in_every_layout(
    kind: str, configs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Branches in updates of unlike size; a chosen token within a ratio that a whole sequence
    has.
    """
    tree = yaml.safe_load(configs["dense"].read_text())
    tree["method"] = {"name": "scripted", "script": SCRIPTED[kind]}
    tree["algorithm"] = {"name": "gspo" if kind == "chosen" else "dr_grpo", "kl": "k3", "beta": 0.1}
    path, layouts = configs["dense"].with_name(f"{kind}.yaml"), ["", "context=2", "pipeline=2"]
    path.write_text(yaml.safe_dump(tree))
    alone, together = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("together")
    run(alone, [f"{path} "], 1)
    run(together, [f"{path} {layout}" for layout in layouts], 2)
    wanted = measured(alone, "")
    assert wanted[0]["grad_norm"] > 0.01
    for layout in layouts:
        assert_same(measured(together, layout), wanted)
