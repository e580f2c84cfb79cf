"""Policies of every layout hand out the folder's own tensors, whole, by one plan that all ranks
share.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import make_model_folder
from tests.families import make_family_folder
from tests.parallel.launch import run_ranks

pytestmark = pytest.mark.parallel

TWO = [
    "tied:tensor=2:float32",
    "untied:pipeline=2:bfloat16",
    "tied:pipeline=2,virtual_pipeline=2:float32",
    "moe:expert=2:float32",
    "one-group:tensor=2:bfloat16",  # one KV group on two ranks
]
FOUR = [
    "untied:tensor=2,pipeline=2:float32",
    "tied:tensor=2:bfloat16",
    "moe:tensor=2,sequence=true,expert=2:float32",
]


@pytest.mark.parametrize(
    ("processes", "cases"), [(2, TWO), pytest.param(4, FOUR, marks=pytest.mark.slow)]
)
def test_parcels_are_the_folders_tensors(processes: int, cases: list[str], tmp_path: Path) -> None:
    models = tmp_path / "models"
    make_model_folder(models / "tied", tied=True)
    make_model_folder(models / "untied", tied=False)
    make_family_folder(models / "moe", "qwen3-moe")
    make_family_folder(models / "one-group", "qwen3-tied")
    run_ranks(processes, "tests.parallel.resharded", models, tmp_path, *cases)
    plans = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(len(cases))]
    assert all(plan["buckets"] > 3 for plan in plans)
    assert any(plan["largest"] > 40_000 for plan in plans)
