"""The configuration: read, overridden, checked; every refusal names the key's path, the value and
what would do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_efr.config import ConfigError, EvaluateConfig, SftConfig, TrainConfig
from megatron_efr.config.file import dump, load

MINIMAL: dict[str, Any] = {
    "name": "a",
    "model": {"path": "m"},
    "data": {"datasets": [{"path": "x.jsonl"}, {"path": "y.jsonl", "limit": 3}]},
    "method": {"name": "efr", "alpha": 0.1},
    "optimizer": {"lr": 1e-4},
}


def read(tmp_path: Path, *overrides: str, text: str | None = None) -> TrainConfig:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) if text is None else text)
    return load(TrainConfig, path, overrides)


def refusal(tmp_path: Path, *overrides: str, text: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, *overrides, text=text)
    return str(caught.value)


def test_what_is_written_out_reads_back_the_same(tmp_path: Path) -> None:
    config = read(tmp_path, "optimizer.lr=1e-6", "model.megatron={recompute_granularity: full}")
    again = tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert load(TrainConfig, again) == config
    assert config.optimizer.lr == 1e-6
    assert config.method.options == {"alpha": 0.1}
    assert config.folder == Path("runs/a")


def test_overrides_reach_sections_new_sections_and_elements_of_lists(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        "data.datasets.0.path=z.jsonl",
        "data.datasets.1.limit=7",
        "rollout.samples=16",
        "method.alpha=0.4",
        "model.path=with=equals",
        "evaluation.datasets=[{path: e.jsonl}]",
        "evaluation.samples_by_dataset={e: 3}",
        "observe.wandb=null",
        "train.iterations=0x10",
        "algorithm.beta=.5",
    )
    assert [(d.path, d.limit) for d in config.data.datasets] == [("z.jsonl", None), ("y.jsonl", 7)]
    assert (config.rollout.samples, config.method.options["alpha"], config.model.path) == (
        16,
        0.4,
        "with=equals",
    )
    assert (config.evaluation.datasets[0].path, config.evaluation.samples_by_dataset) == (
        "e.jsonl",
        {"e": 3},
    )
    assert (config.observe.wandb, config.train.iterations, config.algorithm.options["beta"]) == (
        None,
        16,
        0.5,
    )
    whole = read(tmp_path, "data.datasets.0={path: w.jsonl}")
    assert [d.path for d in whole.data.datasets] == ["w.jsonl", "y.jsonl"]


def test_overrides_reach_below_what_the_resolved_file_holds_as_null(tmp_path: Path) -> None:
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump(read(tmp_path)))
    assert yaml.safe_load(resolved.read_text())["data"]["datasets"][0]["grading"] is None
    config = load(TrainConfig, resolved, ["data.datasets.0.grading.verifier=exact"])
    [own, other] = [dataset.grading for dataset in config.data.datasets]
    assert own is not None
    assert (own.verifier, other) == ("exact", None)
    with pytest.raises(
        ConfigError, match=r"data.datasets.0.grading.verifer: unknown key; did you mean verifier"
    ):
        load(TrainConfig, resolved, ["data.datasets.0.grading.verifer=exact"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.samples", "an override reads section.key=value"),
        ("=3", "an override reads section.key=value"),
        ("name.first=x", "name is a value, not a section"),
        (
            "data.datasets.2.path=x",
            r"'data.datasets.2.path=x': 2 is not a place in that list; its places are 0 to 1",
        ),
        ("data.datasets.-1.path=x", "-1 is not a place in that list"),
        ("data.datasets.first.path=x", "first is not a place in that list"),
        ("data.datasets.2={path: x}", "2 is not a place in that list"),
        ("rollout.samples=[1", "the value is not valid YAML"),
    ],
)
def test_an_override_that_cannot_be_applied_is_quoted(
    tmp_path: Path, override: str, message: str
) -> None:
    assert message in refusal(tmp_path, override)
    assert override in refusal(tmp_path, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.sampels=8", "c.yaml: rollout.sampels: unknown key; did you mean samples"),
        ("optimiser={lr: 1e-4}", "c.yaml: optimiser: unknown key; did you mean optimizer"),
        ("train.micro_batch=8", "train.micro_batch: unknown key; did you mean micro_batch_tokens"),
        ("data.datasets.1.limits=8", "data.datasets.1.limits: unknown key; did you mean limit"),
        (
            "data.prompt.zzz=1",
            "data.prompt.zzz: unknown key; known keys here: date, max_tokens, overlong, prefill, "
            "system",
        ),
        ("rollout.samples=eight", "rollout.samples: Input should be a valid integer (got 'eight')"),
        ("rollout.samples=8.5", "(got 8.5)"),
        ("rollout.samples='8'", "rollout.samples: Input should be a valid integer (got '8')"),
        ("rollout.samples=0", "rollout.samples: Input should be greater than 0 (got 0)"),
        ("data.shuffle=1", "data.shuffle: Input should be a valid boolean (got 1)"),
        ("model.path=3", "model.path: Input should be a valid string (got 3)"),
        (
            "model.dtype=float16",
            "model.dtype: Input should be 'float32' or 'bfloat16' (got 'float16')",
        ),
        ("optimizer.lr=.nan", "optimizer.lr: "),
        ("optimizer.lr=.inf", "optimizer.lr: "),
        ("optimizer.lr=-1e-4", "optimizer.lr: Input should be greater than 0 (got -0.0001)"),
        ("rollout.temperature=0", "rollout.temperature: Input should be greater than 0"),
        (
            "rollout.top_p=0.9",
            "rollout.top_p: Input should be greater than or equal to 1 (got 0.9)",
        ),
        ("data.datasets=[]", "data.datasets: List should have at least 1 item"),
        ("name=../elsewhere", "name: String should match pattern"),
        (
            "rollout.logit_bias={'5': 1}",
            "rollout.logit_bias: tokens that were drawn with a penalty are not the policy's own",
        ),
        (
            "rollout.urls=[http://a:1]",
            "rollout.urls and rollout.server are for SGLang servers; set rollout.engine",
        ),
        (
            "rollout={engine: sglang, urls: [a:1]}",
            "rollout.urls.0: String should match pattern '^https?://'",
        ),
        (
            "rollout={engine: sglang, urls: [http://a:1], server: {a: 1}}",
            "rollout.server: with rollout.urls no server",
        ),
        (
            "rollout={engine: sglang, urls: [http://a:1], placement: colocated}",
            "c.yaml: rollout.urls with rollout.placement: colocated: colocated engines are on the "
            "trainer's own GPUs",
        ),
        ("rollout.timeouts.start=1", "rollout.timeouts.start: unknown key; did you mean start_s"),
        (
            "train.updates=3",
            "rollout.prompts x rollout.samples = 32 x 8 = 256 responses do not split",
        ),
        ("evaluation.preset=custom", "evaluation: preset custom needs a temperature"),
        (
            "evaluation.temperature=1.0",
            "evaluation: preset paper fixes temperature and top_p; set preset: custom",
        ),
        (
            "evaluation={preset: r1, top_p: 0.5}",
            "evaluation: preset r1 fixes temperature and top_p",
        ),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_path(
    tmp_path: Path, override: str, message: str
) -> None:
    assert message in refusal(tmp_path, override)


def test_every_mistake_is_named_at_once_and_what_is_missing_too(tmp_path: Path) -> None:
    text = yaml.safe_dump({key: value for key, value in MINIMAL.items() if key != "optimizer"})
    message = refusal(tmp_path, "rollout.samples=x", "seed=-1", text=text)
    assert len(message.splitlines()) == 3
    for part in ("optimizer: required, and not set", "rollout.samples: ", "seed: "):
        assert part in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [a\n", "not valid YAML"),
        ("name: a\n  b: c\n", "c.yaml:2: not valid YAML"),
        ("- name\n", "expected a mapping of sections, found a list"),
        ("", "expected a mapping of sections, found nothing"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(tmp_path, text=text)
    assert str(tmp_path / "c.yaml") in refusal(tmp_path, text=text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such configuration file"):
        load(TrainConfig, tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        (
            ["parallel.tensor=2"],
            3,
            "tensor 2 x pipeline 1 x context 1 = 2 ranks hold one model, and 3 launched",
        ),
        (
            ["rollout.prompts=2", "rollout.samples=3"],
            2,
            "train.updates: 3 responses per update .* a multiple of 2",
        ),
        (["parallel.sequence=true"], 2, r"parallel\.sequence: .* set parallel\.tensor >= 2"),
        (
            ["parallel.virtual_pipeline=2"],
            2,
            r"parallel\.virtual_pipeline: needs parallel\.pipeline >= 2",
        ),
    ],
)
def test_sizes_that_do_not_divide_over_the_ranks(
    tmp_path: Path, overrides: list[str], ranks: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, *overrides).check_world(ranks)
    read(tmp_path).check_world(ranks + ranks % 2)


def test_a_warm_start_splits_its_batch_over_the_ranks() -> None:
    tree = {
        "name": "s",
        "model": {"path": "m"},
        "data": {"path": "x"},
        "optimizer": {"lr": 1e-3},
        "train": {"updates": 1, "batch": 6},
    }
    config = SftConfig.model_validate(tree)
    config.check_world(3)
    with pytest.raises(
        ConfigError, match=r"train\.batch: 6 sequences do not divide over 4 .* a multiple of 4"
    ):
        config.check_world(4)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, (0.6, 1.0)),
        ({"preset": "r1"}, (0.6, 0.95)),
        ({"preset": "custom", "temperature": 0.0}, (0.0, 1.0)),
        ({"preset": "custom", "temperature": 1.0, "top_p": 0.7}, (1.0, 0.7)),
    ],
)
def test_evaluation_presets(section: dict[str, Any], expected: tuple[float, float]) -> None:
    tree = {"name": "e", "model": {"path": "m"}, "evaluation": section}
    assert EvaluateConfig.model_validate(tree).evaluation.sampling == expected
