"""Gradients of the fused head are those of Megatron, of output layer, embedding and the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import make_model_folder
from tests.parallel.head import CASES
from tests.parallel.launch import run_ranks

pytestmark = pytest.mark.parallel

TWO = ["tensor=2", "tensor=2,sequence=true", "pipeline=2", "context=2", ""]
FOUR_SLOW = [
    "tensor=2,sequence=true,pipeline=2,virtual_pipeline=2",
    "context=2,tensor=2,sequence=true",
    "context=2,pipeline=2",
    "tensor=2",  # with data parallelism
]

Apart = dict[tuple, dict[str, float]]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("tied", "untied"):
        make_model_folder(folder / name, tied=name == "tied")
    return folder


def run(models: Path, out: Path, layouts: list[str], processes: int) -> dict[str, Apart]:
    run_ranks(processes, "tests.parallel.head", models, out, *layouts)
    return {
        layout: torch.load(out / f"{i}.pt", weights_only=False) for i, layout in enumerate(layouts)
    }


@pytest.fixture(scope="session")
def two(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Apart]:
    return run(models, tmp_path_factory.mktemp("two"), TWO, 2)


@pytest.fixture(scope="session")
def four_slow(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Apart]:
    return run(models, tmp_path_factory.mktemp("four"), FOUR_SLOW, 4)


@pytest.mark.parametrize("layout", TWO)
def test_two_ranks(layout: str, two: dict[str, Apart]) -> None:
    assert_equal(layout, two[layout])


@pytest.mark.slow
@pytest.mark.parametrize("layout", FOUR_SLOW)
def test_four_ranks(layout: str, four_slow: dict[str, Apart]) -> None:
    assert_equal(layout, four_slow[layout])


def assert_equal(layout: str, apart: Apart) -> None:
    """The largest distances are printed (`pytest -rP`)."""
    assert list(apart) == [tuple(case) for case in CASES]
    for case in CASES:
        values = apart[tuple(case)]
        worst = max(values, key=lambda name: values[name])
        print(f"{layout or 'data'}: {case}: {worst} {values[worst]:.1e}")
        assert ("lm_head.weight" in values) is not case.tied
        assert values["model.embed_tokens.weight"] >= 0.0
        assert values[worst] <= 1e-5, (case, worst)
