"""Figures of one run of launch/quickstart.sh (read from its summary.json)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SUMMARY = ROOT / "runs" / "quickstart" / "summary.json"


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    if not SUMMARY.exists():
        pytest.skip("runs/quickstart/summary.json is not there: run launch/quickstart.sh first")
    return json.loads(SUMMARY.read_text())


@pytest.fixture(scope="module")
def models(summary: dict[str, Any]) -> dict[float | None, dict[str, Any]]:
    return {model["alpha"]: model for model in summary["models"]}


def test_the_family_is_there_base_first(summary: dict[str, Any]) -> None:
    assert [model["alpha"] for model in summary["models"]] == [None, 0.0, 0.1, 0.4]
    assert all(model["problems"] >= 512 for model in summary["models"])
    # more than twice what it takes on a slow machine: only a hang is a fault
    assert summary["seconds"]["total"] <= 20 * 60


def test_tokens_fall_along_the_family(models: dict[float | None, dict[str, Any]]) -> None:
    tokens = [models[alpha]["tokens"] for alpha in (None, 0.0, 0.1, 0.4)]
    assert tokens == sorted(tokens, reverse=True)
    assert models[0.4]["tokens_ci"][1] < models[0.1]["tokens_ci"][0], (
        "0.1 and 0.4 apart beyond their intervals"
    )


def test_fewer_tokens_at_no_less_accuracy(models: dict[float | None, dict[str, Any]]) -> None:
    base = models[None]
    assert models[0.1]["tokens"] <= 0.8 * base["tokens"]
    assert models[0.4]["tokens"] <= 0.6 * base["tokens"]
    assert min(models[0.1]["accuracy"], models[0.4]["accuracy"]) >= base["accuracy"]


def test_identities_held_in_every_iteration() -> None:
    for alpha in ("0", "0.1", "0.4"):
        path = ROOT / "runs" / "quickstart" / f"alpha-{alpha}" / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 51))
        assert all(
            line["first_ratio_max"] == 1.0 and line["first_kl_to_old"] == 0.0 for line in lines
        )
        assert lines[0]["kl"] == 0.0, "a fresh reference"
        assert all(line["logprob_diff_mean"] < 1e-5 for line in lines)
        assert all(line["skipped"] == 0.0 for line in lines)


def test_the_page_shows_the_figures(models: dict[float | None, dict[str, Any]]) -> None:
    page = (ROOT / "runs" / "quickstart" / "report" / "index.html").read_text()
    for model in models.values():
        assert f"{model['accuracy']:.1%}" in page
        assert f"{model['tokens']:.1f}" in page
    assert "toy task" in page
