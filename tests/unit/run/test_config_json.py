"""How often a program reads its model's config.json: once, whatever it builds from it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from megatron_efr import sft
from megatron_efr.config import EvaluateConfig, SftConfig, TrainConfig
from megatron_efr.data.byte_model import BYTE_MODEL, byte_tokenizer
from megatron_efr.data.model_folder import write_model_folder
from megatron_efr.doctor.__main__ import check_run
from megatron_efr.evaluate import evaluate
from megatron_efr.offline import loop
from megatron_efr.policy import Ranks
from megatron_efr.run import run


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """A configuration that every program shares: a random model, and the run's folder."""
    write_model_folder(tmp_path / "model", byte_tokenizer(), BYTE_MODEL)
    (tmp_path / "sums.jsonl").write_text(json.dumps({"question": "1 + 1", "answer": "2"}) + "\n")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "Q", "response": "R"}) + "\n")
    model = {"path": str(tmp_path / "model"), "init": "random"}
    return {"name": "run", "runs": str(tmp_path / "runs"), "model": model}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, ranks: Ranks) -> list[Path]:
    """Every config.json whose text our code reads; transformers opens its files otherwise."""
    found: list[Path] = []
    read_text = Path.read_text

    def noted(path: Path, *args: Any, **named: Any) -> str:
        if path.name == "config.json":
            found.append(path)
        return read_text(path, *args, **named)

    monkeypatch.setattr(Path, "read_text", noted)
    for module in (run, loop):  # the session has joined already
        monkeypatch.setattr(module, "join_ranks", lambda *_: nullcontext(ranks))
    return found


def test_a_training_run_reads_it_once(tree: dict[str, Any], reads: list[Path]) -> None:
    sums = [{"path": str(Path(tree["runs"]).parent / "sums.jsonl")}]
    tree |= {"data": {"datasets": sums}, "method": {"name": "efr", "alpha": 0.1}}
    tree |= {"optimizer": {"lr": 1e-3}, "rollout": {"max_new_tokens": 9}}
    tree |= {"evaluation": {"datasets": sums, "every": 1, "max_new_tokens": 9}}
    config = TrainConfig.model_validate(tree)
    with run.open_run(config):
        assert len(reads) == 1
    assert {finding.verdict for finding in check_run(config)} == {"ok"}
    assert len(reads) == 2


def test_an_evaluation_reads_it_once(tree: dict[str, Any], reads: list[Path]) -> None:
    sums = [{"path": str(Path(tree["runs"]).parent / "sums.jsonl")}]
    tree["evaluation"] = {"datasets": sums, "samples": 1, "max_new_tokens": 2}
    evaluate(EvaluateConfig.model_validate(tree), "m")
    assert len(reads) == 1


def test_supervised_training_reads_it_once(tree: dict[str, Any], reads: list[Path]) -> None:
    tree |= {"data": {"path": str(Path(tree["runs"]).parent / "rows.jsonl")}}
    tree |= {"optimizer": {"lr": 1e-3}, "train": {"updates": 1, "batch": 1}}
    sft.sft(SftConfig.model_validate(tree))
    # the model folder that it writes is another's: its config.json is read to name the type
    assert len([path for path in reads if "runs" not in path.parts]) == 1
