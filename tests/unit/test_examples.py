"""Every configuration in examples/ is valid, and the paper's say what the paper says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megatron_efr import algorithms, methods
from megatron_efr.cluster.placement import place
from megatron_efr.config import DpoConfig, EvaluateConfig, SftConfig, TrainConfig
from megatron_efr.config.file import dump, load
from megatron_efr.config.sweep import is_sweep, load_sweep
from megatron_efr.data.arithmetic import arithmetic_tokenizer
from megatron_efr.methods.page import KINDS

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(path for path in EXAMPLES.rglob("*.yaml") if not is_sweep(path))
TREES = {path: yaml.safe_load(path.read_text(encoding="utf-8")) for path in FILES}
ON_SERVERS = [
    path
    for path, tree in TREES.items()
    if "method" in tree and tree["rollout"].get("engine") == "sglang"
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_example_is_valid_and_runs_again_from_its_dump(path: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    kinds = {"method": TrainConfig, "evaluation": EvaluateConfig, "preference": DpoConfig}
    kind = next((kinds[section] for section in kinds if section in tree), SftConfig)
    config = load(kind, path)
    again = tmp_path / "config.yaml"
    again.write_text(dump(config))
    assert load(kind, again) == config


@pytest.mark.parametrize(("file", "lr"), [("paper_1.5b.yaml", 5e-6), ("paper_7b.yaml", 2e-6)])
def test_paper_hyperparameters(file: str, lr: float) -> None:
    config = load(TrainConfig, EXAMPLES / file)
    assert (config.rollout.prompts, config.rollout.samples, config.train.updates) == (32, 8, 2)
    assert config.train.iterations * config.rollout.prompts == 3200
    assert (config.optimizer.lr, config.optimizer.beta1, config.optimizer.beta2) == (lr, 0.9, 0.95)
    assert (config.optimizer.warmup_updates, config.optimizer.schedule) == (6, "constant")
    algorithm = algorithms.build(config.algorithm, config.rollout)
    assert (algorithm.name, algorithm.baseline, algorithm.normalize) == ("rloo", "others", "none")
    objective = algorithm.objective(config.rollout)
    assert (objective.low, objective.high, objective.kl, objective.beta) == (
        0.2,
        0.2,
        "reward",
        1e-3,
    )
    assert objective.aggregate == "sequence"
    assert config.data.prompt.prefill == "none"
    assert (config.rollout.temperature, config.rollout.max_new_tokens) == (1.0, 32000)
    assert config.data.prompt.max_tokens == 512
    assert config.evaluation.sampling == (0.6, 1.0)
    assert config.evaluation.samples_by_dataset == {"gsm8k_test": 1, "math500": 3, "aime24": 10}
    assert config.seed == 42
    assert (
        config.train.micro_batch_tokens or 0
    ) >= config.rollout.max_new_tokens + config.data.prompt.max_tokens


@pytest.mark.parametrize("path", ON_SERVERS, ids=lambda path: path.name)
def test_a_training_run_on_servers_divides_over_nodes_of_eight_gpus(path: Path) -> None:
    """One node, unless the file's name says how many."""
    config, nodes = load(TrainConfig, path), int((re.findall(r"(\d+)nodes", path.name) or ["1"])[0])
    placement = place([f"node{number}" for number in range(nodes)], 8, config.rollout)
    config.check_world(len(placement.ranks))
    assert len(placement.ranks) == 8 * nodes


def test_what_lies_beyond_the_paper_is_an_example_whose_levels_are_told_apart() -> None:
    made = load_sweep(EXAMPLES / "beyond.yaml")
    models = {member.model: member for member in made.members}
    assert list(models) == ["min_std", "paper", "target", "effort", "one_alpha"]
    words = models["effort"].config.method.model_dump()["words"]
    assert models["one_alpha"].config.method.model_dump()["words"] == words
    asked = [arithmetic_tokenizer().encode(f"1+2{word}").ids for word in words]
    assert len({tuple(ids) for ids in asked}) == len(words) == 3
    assert [len(ids) - 3 for ids in asked] == [1, 0, 1], "medium effort has no sign"


def test_the_family_has_rloo_grpo_and_sixteen_methods_or_more_of_three_seeds() -> None:
    made = load_sweep(EXAMPLES / "family.yaml")
    built = []
    for member in made.members:
        config = member.config
        method = methods.build(config.method, config.rollout, config.algorithm)
        algorithm = algorithms.build(config.algorithm, config.rollout)
        methods.check_together(config.method.name, method, algorithm)
        priced = config.method.name if config.method.options.get("alpha") != 0 else "none"
        built.append((member.model, priced, algorithm.name, config.seed))
    names = list(dict.fromkeys(built[i][:3] for i in range(len(built))))
    assert names[:2] == [("rloo", "none", "rloo"), ("grpo", "none", "grpo")], (
        "without a price on length"
    )
    assert len({method for _, method, _ in names[2:]}) == len(names) - 2 >= 16
    assert [seed for *_, seed in built] == [1, 2, 3] * len(names)


def test_grpo_is_held_against_both_forms_of_filtered_sft() -> None:
    made = {}
    for member in load_sweep(EXAMPLES / "filtered_sft.yaml").members:
        config = member.config
        assert (config.method.name, config.method.options["alpha"], config.train.updates) == (
            "efr",
            0,
            1,
        )
        made[member.model] = algorithms.build(config.algorithm, config.rollout)
    assert {name: algorithm.name for name, algorithm in made.items()} == {
        name: name for name in made
    }
    assert sorted(made) == ["filtered_sft", "filtered_sft_negatives", "grpo"]
    assert {algorithm.kl for algorithm in made.values()} == {"none"}


def test_there_is_an_example_of_every_kind_of_method() -> None:
    kinds = {}
    for member in load_sweep(EXAMPLES / "kinds.yaml").members:
        config = member.config
        method = methods.build(config.method, config.rollout, config.algorithm)
        methods.check_together(
            config.method.name, method, algorithms.build(config.algorithm, config.rollout)
        )
        kinds[member.model] = type(method).__module__.rpartition(".")[2]
    assert kinds == {"paper" if kind == "efr" else kind: kind for kind in KINDS}
