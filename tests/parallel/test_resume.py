"""A checkpoint saved under one layout goes on under another: the same bits taken up, the same next
update made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_model_folder
from tests.families import make_family_folder
from tests.parallel.launch import run_ranks

pytestmark = pytest.mark.parallel

VPP = "pipeline=2,virtual_pipeline=2"
SAVED = {4: ["tensor=2,pipeline=2"], 2: [VPP, "", "expert=2"]}  # "" is data parallel
LOADED = [  # (layout, the one it was saved under)
    ("pipeline=2", "tensor=2,pipeline=2"),
    (VPP, "tensor=2,pipeline=2"),
    ("", VPP),
    ("tensor=2", VPP),
    ("context=2", ""),
    ("tensor=2,sequence=true,expert=1", "expert=2"),
]
LOADED_ALONE = [("", "tensor=2,pipeline=2"), ("", VPP), ("", ""), ("expert=1", "expert=2")]
LAYOUTS = ["pipeline=2", VPP, "tensor=2", "tensor=2,sequence=true", "context=2", ""]
LOADED_SLOW = [
    *((layout, origin) for layout in LAYOUTS for origin in ("tensor=2,pipeline=2", VPP, "")),
    *((layout, "expert=2") for layout in ("expert=2", "pipeline=2,expert=1", "context=2,expert=2")),
]


def run(out: Path, asked: list[str], processes: int) -> None:
    """Start the ranks once; they do what is asked in turn."""
    run_ranks(processes, "tests.parallel.resume", out / "models", out, *asked)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints under every layout of SAVED, with what their runs did next; those of two ranks
    loaded there too.
    """
    out = tmp_path_factory.mktemp("resume")
    make_model_folder(out / "models/untied", tied=False)
    make_family_folder(out / "models/moe", "qwen3-moe")
    run(out, [f"save {layout}" for layout in SAVED[4]], 4)
    run(
        out,
        [*(f"save {layout}" for layout in SAVED[2]), *((f"load {a} from {b}") for a, b in LOADED)],
        2,
    )
    return out


@pytest.fixture(scope="module")
def alone(saved: Path) -> Path:
    run(saved, [f"load {layout} from {origin}" for layout, origin in LOADED_ALONE], 1)
    return saved


@pytest.fixture(scope="module")
def slow(saved: Path) -> Path:
    run(saved, [f"load {layout} from {origin}" for layout, origin in LOADED_SLOW], 2)
    return saved


def assert_goes_on(out: Path, layout: str, origin: str) -> None:
    """Differences of the next update are printed (`pytest -rP`)."""
    one: dict[str, Any] = torch.load(out / f"save {origin}.pt", weights_only=False)
    other: dict[str, Any] = torch.load(out / f"load {layout} from {origin}.pt", weights_only=False)
    for field in ("weights", "exp_avg", "exp_avg_sq"):
        assert one[field].keys() == other[field].keys()
        for name, tensor in one[field].items():
            assert torch.equal(tensor, other[field][name]), (field, name)
            assert field == "weights" or tensor.abs().max() > 0, (field, name)
    assert other["lr"] == one["lr"]
    logprobs = max(
        float((one["logprobs"][i] - other["logprobs"][i]).abs().max()) for i in one["logprobs"]
    )
    gradient = max(
        float((a - other["gradients"][name]).norm() / a.norm())
        for name, a in one["gradients"].items()
    )
    change = 0.0
    for name, a in one["change"].items():
        rounding = float(one["weights"][name].norm()) * 2.0**-24  # of storing a weight in fp32 once
        change = max(
            change, (float((a - other["change"][name]).norm()) - rounding) / float(a.norm())
        )
    print(
        f"{layout or 'data'}: log-probs {logprobs:.1e}, gradient {gradient:.1e}, change "
        f"{change:.1e}"
    )
    assert logprobs <= 1e-5
    assert gradient <= 1e-5
    assert change <= 1e-3


@pytest.mark.parametrize(("layout", "origin"), LOADED)
def test_two_ranks_go_on(layout: str, origin: str, saved: Path) -> None:
    assert_goes_on(saved, layout, origin)


@pytest.mark.parametrize(("layout", "origin"), LOADED_ALONE)
def test_one_rank_goes_on(layout: str, origin: str, alone: Path) -> None:
    assert_goes_on(alone, layout, origin)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "origin"), LOADED_SLOW)
def test_every_layout_goes_on_from_every_other(layout: str, origin: str, slow: Path) -> None:
    assert_goes_on(slow, layout, origin)
