"""Low-rank adapters under every split are what one process trains, and what their checkpoints
hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_efr.checkpoint.torch_dist import CheckpointWeights
from megatron_efr.weights.architecture import Architecture
from tests.conftest import make_model_folder
from tests.parallel.launch import run_ranks
from tests.parallel.layout import folder

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

TWO = ["tensor=2", "tensor=2,sequence=true", "pipeline=2", "context=2", ""]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"), tied=True)


def run(model: Path, out: Path, layouts: list[str], processes: int) -> None:
    for layout in layouts:
        (out / folder(layout)).mkdir(parents=True)
    run_ranks(processes, "tests.parallel.adapters", model, out, *layouts)


def apart(one: dict[Any, torch.Tensor], other: dict[Any, torch.Tensor]) -> float:
    """The largest difference of two sets of tensors, relative to each one's norm."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / one[name].norm()) for name in one)


def test_every_split_trains_the_same_adapters(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "one", [""], 1)
    run(model, tmp_path / "many", TWO, 2)
    single = torch.load(tmp_path / "one" / "data" / "result.pt")
    assert len(single["gradients"]) == 4 * 7 * 2
    for layout in TWO:
        place = tmp_path / "many" / folder(layout)
        found = torch.load(place / "result.pt")
        differences = {what: apart(single[what], found[what]) for what in single if what != "norm"}
        print(
            f"{layout or 'data'}: "
            + ", ".join(f"{what} {value:.1e}" for what, value in differences.items())
        )
        assert max(differences.values()) <= 1e-5, layout
        assert found["norm"] == pytest.approx(single["norm"], rel=1e-5)
        stored = CheckpointWeights(place / "step_000003", Architecture.from_folder(model))
        assert all(
            torch.equal(tensor, found["adapters"][name])
            for name, tensor in stored.adapters().items()
        )
        assert stored.adapters().keys() == found["adapters"].keys()
        assert apart(dict(stored.items()), found["weights"]) <= 1e-7


def test_adapters_that_the_passes_gather_are_the_newest(model: Path, tmp_path: Path) -> None:
    """Adam's second update, of adapters whose halves two ranks have changed: as without sharding,
    bit for bit.
    """
    run(model, tmp_path, ["plain", "overlapped"], 2)
    plain, found = (torch.load(tmp_path / each / "result.pt") for each in ("plain", "overlapped"))
    print(f"losses {plain['losses']}, {found['losses']}")
    assert plain["losses"][1] < plain["losses"][0] - 0.1
    assert found["losses"] == plain["losses"]
    assert found["adapters"].keys() == plain["adapters"].keys()
    assert all(
        torch.equal(tensor, found["adapters"][name]) for name, tensor in plain["adapters"].items()
    )
