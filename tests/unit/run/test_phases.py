"""The memory of the devices goes from engines to policy and back in one order; what fails leaves no
engine serving.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_efr.policy import Ranks, supervised_loss
from megatron_efr.publication.publisher import Embedded
from megatron_efr.rollout.local.engine import LocalEngine
from megatron_efr.rollout.servers.run_servers import Servers
from megatron_efr.run.phases import FREED, STEPS, Phases, State, is_freed
from megatron_efr.types import Sampling, UserError
from tests.conftest import ragged_sequences
from tests.engine_contract import requests
from tests.policies import make_policy

ORDER = (
    [
        "offload:",
        "offload_training_state",
        "wake:",
        "allow",
        "wake",
        "publish:",
        "publish",
        "resume:",
        "resume",
    ],
    ["release:", "hold", "sleep", "restore:", "restore_training_state"],
)


class Parts:
    """Engine, policy, publisher and timer of a run at once, which note what is asked of them."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.failing = ""

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*_: Any) -> int:
            self.asked.append(name)
            if name == self.failing:
                raise OSError(f"{name} failed")
            return 1

        return call

    @contextlib.contextmanager
    def timer(self, name: str) -> Iterator[None]:
        self.asked.append(f"{name}:")
        yield


@pytest.fixture
def parts() -> Parts:
    return Parts()


def step(phases: Phases, name: str, parts: Parts) -> None:
    if name == "to_policy":
        phases.to_policy(parts, parts.timer)
    else:
        phases.to_engines(parts, 1, parts.timer)


def test_engines_that_share_devices_sleep_before_the_policy_is_built_and_serve_once_they_have_its_weights(
    parts: Parts, ranks: Ranks
) -> None:
    phases = Phases(parts, parts, parts, ranks, shared=True)
    assert parts.asked == ["hold", "sleep"]
    for name, order in zip(("to_engines", "to_policy"), ORDER, strict=True):
        parts.asked.clear()
        step(phases, name, parts)
        assert parts.asked == order


def test_engines_that_share_nothing_are_only_published_to(parts: Parts, ranks: Ranks) -> None:
    phases = Phases(parts, parts, parts, ranks, shared=False)
    for name in ("to_engines", "to_engines", "to_policy", "to_policy", "to_engines"):
        step(phases, name, parts)
    assert parts.asked == ["publish:", "publish"] * 3


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize(("name", "first"), [("to_policy", "release"), ("to_engines", "offload")])
def test_in_any_other_state_a_scatter_samples_is_refused_in_words_and_asks_nothing_of_anybody(
    name: str, first: str, state: State, parts: Parts, ranks: Ranks
) -> None:
    phases = Phases(parts, parts, parts, ranks, shared=True)
    phases.state = state
    if STEPS[first][0] is state:
        step(phases, name, parts)
        return
    parts.asked.clear()
    with pytest.raises(RuntimeError, match=f"{first}: the engines .*; [a-z]+ is next"):
        step(phases, name, parts)
    assert parts.asked == []
    assert phases.state is state


@pytest.mark.parametrize(
    ("failing", "left"),
    [
        ("offload_training_state", State.TRAINING),
        ("wake", State.OFFLOADED),
        ("publish", State.AWAKE),
        ("resume", State.PUBLISHED),
    ],
)
def test_whatever_fails_no_engine_goes_on_serving(
    failing: str, left: State, parts: Parts, ranks: Ranks
) -> None:
    phases = Phases(parts, parts, parts, ranks, shared=True)
    parts.failing = failing
    with pytest.raises(OSError, match=failing):
        step(phases, "to_engines", parts)
    assert phases.state is left
    assert parts.asked[-1] == failing
    for name in ("to_policy", "to_engines"):
        if left is not State.TRAINING or name == "to_policy":
            with pytest.raises(RuntimeError, match="is next"):
                step(phases, name, parts)


def test_unfinished_responses_of_the_embedded_engine_go_on_after_an_update_with_its_weights(
    tied_model: Path, ranks: Ranks
) -> None:
    """With real parts: what was drawn before the engine slept is of version 1, what came after of
    version 2.
    """
    engine = LocalEngine(tied_model, 8)
    phases = Phases(Embedded(engine), engine, Servers(), ranks, shared=True)
    policy = make_policy(tied_model, ranks)
    untimed = contextlib.nullcontext
    phases.to_engines(policy, 1, untimed)
    stream = engine.generate(requests(20), Sampling(1.0, 1.0, 40, (2,)))
    groups = [next(stream)]
    phases.to_policy(policy, untimed)
    with pytest.raises(RuntimeError, match="paused"):
        next(stream)
    policy.update(
        policy.pack_update(ragged_sequences(4), [0, 1, 2, 3], 400, "token"), supervised_loss
    )
    phases.to_engines(policy, 2, untimed)
    groups += stream
    assert len(groups) == 20
    kinds = {
        tuple(span.version for span in response.versions)
        for group in groups
        for response in group.responses
    }
    assert kinds == {(1,), (1, 2), (2,)}


def test_memory_is_released_where_the_engines_weights_at_least_are_free_again() -> None:
    weights = 15 * 2**30
    assert is_freed(int(FREED * weights) + 1, weights)
    assert not is_freed(int(FREED * weights) - 1, weights)
    assert not is_freed(0, weights)
    assert is_freed(-(2**20), 0), "nobody had any to release"


def test_engines_that_release_nothing_stop_the_run_and_the_memory_saver_is_named(
    parts: Parts, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here there is no GPU whose memory could grow."""
    monkeypatch.setattr("megatron_efr.run.phases.WAIT_S", 0.0)
    with pytest.raises(
        UserError,
        match=r"0\.00 GiB more free; .* are 3\.00 GiB\. .*rollout\.server\.enable_memory_saver",
    ):
        Phases(parts, parts, parts, ranks, shared=True, engine_bytes=3 * 2**30)
