"""Engine and trainer on one card: what leaves it in each phase, measured, and what goes on as it
was.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_efr.config import ModelConfig, RolloutConfig
from megatron_efr.memory import gradient_bytes, optimizer_bytes
from megatron_efr.policy import Policy, Ranks
from megatron_efr.publication.sglang_layout import EngineLayout
from megatron_efr.publication.transports import Handles
from megatron_efr.rollout.servers.launcher import Launcher
from megatron_efr.rollout.servers.run_servers import Servers
from megatron_efr.rollout.sglang.engine import SGLangEngine
from megatron_efr.run.phases import Phases, free_bytes
from megatron_efr.types import Sampling
from megatron_efr.weights.architecture import Architecture
from tests.conftest import make_model_folder
from tests.engine.conftest import PYTHON
from tests.engine.published import make_publisher
from tests.engine_contract import requests
from tests.unit.policy.test_optimizer import SHARDED, build, equal, state, update

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def places(policy: Policy) -> list[tuple[torch.device, int]]:
    return [(p.device, p.data_ptr()) for chunk in policy.chunks for p in chunk.parameters()]


@pytest.mark.parametrize("ddp", [{}, SHARDED], ids=["plain", "sharded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_and_optimizer_leave_the_card_the_weights_stay_and_the_next_update_is_the_same(
    ddp: dict[str, Any], dtype: str, tied_model: Path, ranks: Ranks
) -> None:
    stayed, left = (build(tied_model, ranks, ddp, dtype) for _ in range(2))
    for policy in (stayed, left):
        update(policy)
    kept, weights = state(left), places(left)
    before = torch.cuda.memory_allocated()
    left.offload_training_state()
    count = sum(p.numel() for chunk in left.chunks for p in chunk.parameters())
    assert before - torch.cuda.memory_allocated() >= 0.95 * (
        gradient_bytes(count) + optimizer_bytes(count, dtype)
    )
    assert places(left) == weights
    left.restore_training_state()
    assert places(left) == weights
    assert equal(state(left), kept)
    for policy in (stayed, left):
        update(policy)
    assert equal(state(left), state(stayed))


SHARE = 0.15
"""Of the card's free memory, the server's."""


@pytest.fixture
def wide_model(tmp_path: Path) -> Path:
    """Heads of 64, as real models have at least: not all of SGLang's kernels know smaller ones."""
    return make_model_folder(tmp_path / "wide", tied=True, hidden=256)


@pytest.fixture
def engine(wide_model: Path, tmp_path: Path) -> Iterator[SGLangEngine]:
    """A server that shares this process's card."""
    if not os.access(PYTHON, os.X_OK):
        pytest.skip(f"{PYTHON} is not there: bash launch/install_h100.sh makes it")
    section = {
        "engine": "sglang",
        "python": str(PYTHON),
        "placement": "colocated",
        "slots": 8,
        "server": {"mem_fraction_static": SHARE},
    }
    rollout, architecture = (
        RolloutConfig.model_validate(section),
        Architecture.from_folder(wide_model),
    )
    model = ModelConfig(path=str(wide_model), dtype="bfloat16")
    torch.cuda.empty_cache()  # what other tests have left
    with Launcher(tmp_path / "engines", rollout.timeouts.stop_s) as launcher:
        launcher.start_engine(model, architecture, rollout, 0, seed=0, on_gpu=True, shared=True)
        urls = launcher.wait(rollout.timeouts.start_s)
        made = SGLangEngine(
            urls, architecture, rollout.slots, rollout.timeouts, key=launcher.key, dtype=model.dtype
        )
        yield made
        made.close()


def test_a_server_releases_its_share_of_the_card_and_goes_on_with_the_policys_new_weights(
    engine: SGLangEngine, wide_model: Path, ranks: Ranks
) -> None:
    layout, full = EngineLayout(engine.architecture, 1), free_bytes()
    publisher = make_publisher(
        Handles(engine, ranks.cpu_world), engine, layout, ranks, torch.bfloat16, "fmix32"
    )
    share = int(0.8 * SHARE / (1 - SHARE) * full)  # of the card: `full` is what the server left
    phases = Phases(publisher, engine, Servers(), ranks, shared=True, engine_bytes=share)
    assert free_bytes() - full >= share
    policy = build(wide_model, ranks, SHARDED, "bfloat16")
    phases.to_engines(policy, 1, contextlib.nullcontext)
    assert abs(free_bytes() - full) < 0.5 * share
    stream = engine.generate(requests(20), Sampling(1.0, 1.0, 300, (2,)))
    groups = [next(stream)]
    phases.to_policy(policy, contextlib.nullcontext)
    update(policy)
    phases.to_engines(policy, 2, contextlib.nullcontext)
    groups += stream
    assert len(groups) == 20
    spans = {
        tuple(span.version for span in response.versions)
        for group in groups
        for response in group.responses
    }
    assert (1, 2) in spans
