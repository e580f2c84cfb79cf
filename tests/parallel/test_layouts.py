"""Every parallel layout gives what one process gives: log-probs, gradients, and the state after
three optimizer steps.

The one process packs each update into a single micro-batch, so this is invariance to the token
budget as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_model_folder
from tests.families import make_family_folder
from tests.parallel.launch import run_ranks
from tests.parallel.layout import CASES, Case, kind

pytestmark = pytest.mark.parallel

TWO = [
    "tensor=2",
    "tensor=2,sequence=true",
    "pipeline=2",
    "pipeline=2,virtual_pipeline=2",
    "context=2",
    "",  # data parallel
    "expert=2",
    # a mixture of experts whose stages replay what is theirs
    "expert=1,pipeline=2,virtual_pipeline=2",
]
TWO_SLOW = ["expert=1,tensor=2,sequence=true", "expert=1,context=2", "expert=1,pipeline=2"]
# the latter with data parallelism
FOUR = ["tensor=2,sequence=true,pipeline=2", "tensor=2,sequence=true"]
FOUR_SLOW = [
    "context=2,tensor=2,sequence=true",
    "context=2,tensor=2",
    "context=4",  # more ranks than KV heads
    "tensor=4",  # likewise
    "context=2,pipeline=2,virtual_pipeline=2",
    "pipeline=2",  # with data parallelism
    "tensor=2,sequence=true,expert=2",
    "context=2,expert=2,pipeline=2",
]
EIGHT_SLOW = [
    "tensor=2,sequence=true,pipeline=2,context=2",
    "tensor=2,sequence=true,pipeline=2,virtual_pipeline=2",
]

Results = dict[tuple[Case, str], dict[str, Any]]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_model_folder(folder / "tied", tied=True)
    make_model_folder(folder / "untied", tied=False)
    make_family_folder(folder / "moe", "qwen3-moe", num_hidden_layers=4)
    return folder


def run(models: Path, out: Path, layouts: list[str], processes: int) -> dict[str, Results]:
    """Start the ranks once, and let them take on the layouts in turn."""
    run_ranks(processes, "tests.parallel.layout", models, out, *layouts)
    return {
        layout: torch.load(out / f"{i}.pt", weights_only=False) for i, layout in enumerate(layouts)
    }


@pytest.fixture(scope="session")
def single(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """One process's results, of every case."""
    results = run(models, tmp_path_factory.mktemp("single"), ["", "expert=1"], 1)
    return results[""] | results["expert=1"]


@pytest.fixture(scope="session")
def two(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    return run(models, tmp_path_factory.mktemp("two"), TWO, 2)


@pytest.fixture(scope="session")
def two_slow(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    return run(models, tmp_path_factory.mktemp("two-slow"), TWO_SLOW, 2)


@pytest.fixture(scope="session")
def four(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    return run(models, tmp_path_factory.mktemp("four"), FOUR, 4)


@pytest.fixture(scope="session")
def four_slow(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    return run(models, tmp_path_factory.mktemp("four-slow"), FOUR_SLOW, 4)


@pytest.fixture(scope="session")
def eight_slow(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    return run(models, tmp_path_factory.mktemp("eight-slow"), EIGHT_SLOW, 8)


@pytest.mark.parametrize("layout", TWO)
def test_two_ranks(layout: str, two: dict[str, Results], single: Results) -> None:
    assert_parity(layout, two[layout], single)


@pytest.mark.slow
@pytest.mark.parametrize("layout", TWO_SLOW)
def test_two_ranks_otherwise(layout: str, two_slow: dict[str, Results], single: Results) -> None:
    assert_parity(layout, two_slow[layout], single)


@pytest.mark.parametrize("layout", FOUR)
def test_four_ranks(layout: str, four: dict[str, Results], single: Results) -> None:
    assert_parity(layout, four[layout], single)


@pytest.mark.slow
@pytest.mark.parametrize("layout", FOUR_SLOW)
def test_four_ranks_otherwise(layout: str, four_slow: dict[str, Results], single: Results) -> None:
    assert_parity(layout, four_slow[layout], single)


@pytest.mark.slow
@pytest.mark.parametrize("layout", EIGHT_SLOW)
def test_eight_ranks(layout: str, eight_slow: dict[str, Results], single: Results) -> None:
    assert_parity(layout, eight_slow[layout], single)


def assert_parity(layout: str, many: Results, single: Results) -> None:
    """Log-probs, and each gradient relative to its norm, to 1e-5; so the change of each weight
    after three SGD steps, and after three Adam steps to 1e-3 of it. The largest differences are
    printed (`pytest -rP`).
    """
    worst = dict.fromkeys(("log-probs", "gradient", "sgd change", "adam change"), 0.0)
    for case in CASES[kind(layout)]:
        for optimizer in ("sgd", "adam"):
            one, other = single[case, optimizer], many[case, optimizer]
            assert one["logprobs"].keys() == other["logprobs"].keys()
            logprobs = max(
                float((one["logprobs"][i] - other["logprobs"][i]).abs().max())
                for i in one["logprobs"]
            )
            worst["log-probs"] = max(worst["log-probs"], logprobs)
            for name, a in one["gradients"].items():
                worst["gradient"] = max(
                    worst["gradient"], float((a - other["gradients"][name]).norm() / a.norm())
                )
            for name, a in one["change"].items():
                apart = max(float((a - other["change"][name]).norm()) - one["rounding"][name], 0.0)
                worst[f"{optimizer} change"] = max(
                    worst[f"{optimizer} change"], apart / float(a.norm())
                )
            for mine, theirs in zip(one["metrics"], other["metrics"], strict=True):
                assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5), (case, optimizer)
    print(
        f"{layout or 'data'}: " + ", ".join(f"{what} {value:.1e}" for what, value in worst.items())
    )
    assert worst["log-probs"] <= 1e-5
    assert worst["gradient"] <= 1e-5
    assert worst["sgd change"] <= 1e-5
    assert worst["adam change"] <= 1e-3
