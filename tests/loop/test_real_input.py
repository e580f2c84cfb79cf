"""Real problems end to end: GSM8K's own rows through chat template, rollouts, math-verify, training
and evaluation.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_efr.data.byte_model import BYTE_MODEL, byte_tokenizer
from megatron_efr.data.model_folder import write_model_folder
from megatron_efr.run.folder import RunFolder
from tests.loop.conftest import Program

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "tests/data"
LIMITS = {"gsm8k_test": 8, "math500": 8, "aime24": 4}
SAMPLES = {"gsm8k_test": 1, "math500": 3, "aime24": 10}


@pytest.fixture(scope="module")
def run(program: Program, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """examples/gsm8k_cpu.yaml as it is, but for the place of its files."""
    place = tmp_path_factory.mktemp("real")
    write_model_folder(place / "model", byte_tokenizer(), BYTE_MODEL)
    done = program(
        "train",
        ROOT / "examples/gsm8k_cpu.yaml",
        f"runs={place}",
        f"model.path={place / 'model'}",
        f"data.datasets.0.path={ROWS / 'gsm8k_train.jsonl'}",
        *(f"evaluation.datasets.{i}.path={ROWS / name}.jsonl" for i, name in enumerate(LIMITS)),
    )
    (place / "output.txt").write_text(done.stdout)
    return RunFolder(place / "gsm8k-cpu")


def test_the_identities_hold_on_real_prompts(run: RunFolder) -> None:
    lines = run.read_metrics()
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["first_ratio_max"] == 1
        assert line["first_kl_to_old"] == 0
        assert 0 < line["logprob_diff_mean"] < 1e-5
        assert line["tokens_total"] == pytest.approx(line["tokens_mean"] * 64)
        assert 1 <= line["tokens_mean"] <= 64
        graded = {key: value for key, value in line.items() if key.startswith("graded/")}
        assert sum(graded.values()) == 64
        assert line["skipped"] == 0
    assert lines[0]["kl"] == 0  # the reference is fresh


def test_the_run_folder_holds_what_it_should(run: RunFolder) -> None:
    found = {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}
    expected = {
        "config.yaml",
        "metrics.jsonl",
        "eval/step_000003.json",
        "checkpoints/latest",
        "model/config.json",
    }
    expected |= {
        "model/model.safetensors",
        "model/tokenizer.json",
        "checkpoints/step_000003/manifest.json",
    }
    expected |= {f"rollouts/step_{step:06d}.jsonl.zst" for step in (1, 2, 3)}
    assert expected - found == set()
    assert not [path for path in found if "partial" in path or path.endswith(".tmp")]
    assert (run.checkpoints / "latest").read_text() == "step_000003"
    saved = yaml.safe_load(run.config.read_text())
    assert [Path(dataset["path"]).stem for dataset in saved["evaluation"]["datasets"]] == list(
        LIMITS
    )


def test_the_prompts_are_the_rows_in_the_chat_template(run: RunFolder) -> None:
    rows = [json.loads(line) for line in (ROWS / "gsm8k_train.jsonl").read_text().splitlines()]
    golds = {row["question"]: row["answer"].rpartition("#### ")[2].replace(",", "") for row in rows}
    groups = [credited.group for step in (1, 2, 3) for credited in run.read_rollouts(step)]
    assert len(groups) == 48
    # an epoch has every row once
    assert len({group.prompt.id for group in groups[: len(rows)]}) == len(rows)
    tokenizer = byte_tokenizer()
    for group in groups:
        question = group.prompt.text.partition("Question: ")[2].removesuffix("<assistant>")
        assert group.prompt.gold == golds[question]
        assert group.prompt.text.startswith("<bos><user>Please reason step by step")
        assert list(group.prompt.tokens) == tokenizer.encode(group.prompt.text).ids
        assert [len(response.logprobs) for response in group.responses] == group.lengths.tolist()
    output = (run.path.parent / "output.txt").read_text()
    assert output.count("prompt gsm8k_train/") == 3


def test_the_evaluation_covers_three_data_sets(run: RunFolder) -> None:
    record = run.read_evaluations()["step_000003"]
    assert list(record["datasets"]) == list(LIMITS)
    for name, figures in record["datasets"].items():
        assert figures["problems"] == LIMITS[name]
        assert figures["samples"] == LIMITS[name] * SAMPLES[name]
        low, high = figures["accuracy_ci"]
        assert 0 <= low <= figures["accuracy"] <= high <= 1
        assert 1 <= figures["tokens"] <= 64
        assert 0 <= figures["truncated"] <= 1
    assert run.read_metrics()[-1]["eval/tokens"] == record["tokens"]
