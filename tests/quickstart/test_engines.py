"""Figures of launch/quickstart.sh with --engine sglang, beside the embedded engine (from both
summary.json).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_efr.report.agreement import compare

RUNS = Path(__file__).parents[2] / "runs"
FAMILIES = ("quickstart", "quickstart-sglang")

CHANCE = {"accuracy": 0.015, "tokens": 4.0}
"""Three runs from one warm start, on the embedded engine, were as far apart at most."""


@pytest.fixture(scope="module")
def summaries() -> list[dict[str, Any]]:
    """The embedded engine's family, and SGLang's."""
    paths = [RUNS / family / "summary.json" for family in FAMILIES]
    for path, options in zip(paths, ("", " --engine sglang"), strict=True):
        if not path.exists():
            pytest.skip(f"{path} is not there: run launch/quickstart.sh{options} first")
    return [json.loads(path.read_text()) for path in paths]


def test_both_families_began_with_the_same_weights(summaries: list[dict[str, Any]]) -> None:
    first, second = (
        (RUNS / family / "sft/model/model.safetensors").read_bytes() for family in FAMILIES
    )
    assert first == second


def test_the_base_has_the_same_figures_on_both(summaries: list[dict[str, Any]]) -> None:
    compared = compare(*summaries)[:2]
    assert [found.one["name"] for found in compared] == ["base", "base"]
    assert [found.row() for found in compared if not found.agree] == []


def test_trained_models_are_as_near_as_other_random_numbers_leave_them(
    summaries: list[dict[str, Any]],
) -> None:
    compared = compare(*summaries)[2:]
    assert len(compared) == 6
    assert [found.row() for found in compared if found.gap > CHANCE[found.key]] == []


def test_engine_and_policy_agreed_in_every_iteration(summaries: list[dict[str, Any]]) -> None:
    for alpha in ("0", "0.1", "0.4"):
        path = RUNS / "quickstart-sglang" / f"alpha-{alpha}" / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 51))
        assert all(
            line["first_ratio_max"] == 1.0 and line["first_kl_to_old"] == 0.0 for line in lines
        )
        assert all(line["logprob_diff_mean"] < 1e-5 for line in lines)
