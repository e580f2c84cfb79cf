"""A real server that shares its device: it sleeps while a real policy trains, and goes on where it
was.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from megatron_efr.config import TimeoutsConfig
from megatron_efr.errors import EngineError
from megatron_efr.policy import Policy, Ranks, supervised_loss
from megatron_efr.publication.sglang_layout import EngineLayout
from megatron_efr.publication.transports import InBand
from megatron_efr.rollout.servers.run_servers import Servers
from megatron_efr.rollout.sglang.engine import SGLangEngine
from megatron_efr.rollout.sglang.server import CACHES, WEIGHTS
from megatron_efr.run.phases import Phases, State
from megatron_efr.types import Sampling
from megatron_efr.weights.architecture import Architecture
from tests.conftest import ragged_sequences
from tests.engine.conftest import STOP, MakeSGLang
from tests.engine.published import make_policy, make_publisher
from tests.engine.test_parity import TOLERANCE, Models, asked, exact_logprobs, weights_of


class Failing(InBand):
    """Refuses the third bucket."""

    delivered = 0

    def deliver(self, prepared: object) -> None:
        super().deliver(prepared)
        self.delivered += 1
        if self.delivered % 3 == 0:
            raise EngineError("no memory for the third bucket")


@pytest.fixture
def engine(make_engine: MakeSGLang, models: Models) -> Iterator[SGLangEngine]:
    """Whatever a test does to it, the session's server is awake and serves afterwards."""
    made = make_engine(limits=TimeoutsConfig(response_s=60))
    yield made
    made.wake()
    made.publish(weights_of(models[0]), version=99)
    made.resume()


def sharing(
    engine: SGLangEngine, transport: InBand, folder: Path, ranks: Ranks
) -> tuple[Phases, Policy]:
    """An engine that sleeps, and a policy to hand its device to and fro with."""
    layout = EngineLayout(Architecture.from_folder(folder), 1)
    phases = Phases(
        make_publisher(transport, engine, layout, ranks), engine, Servers(), ranks, shared=True
    )
    return phases, make_policy(folder, "", ranks)


def held_by(policy: Policy, like: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """The policy's weights as transformers' model."""
    model = copy.deepcopy(like)
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, tensor in policy.named_weights():
            parameters[name].copy_(tensor)
    return model


def test_responses_in_flight_survive_the_sleep_and_each_part_matches_its_own_weights(
    engine: SGLangEngine, folders: tuple[Path, Path], models: Models, ranks: Ranks
) -> None:
    phases, policy = sharing(engine, InBand(engine), folders[0], ranks)
    phases.to_engines(policy, 1, contextlib.nullcontext)
    by_version = {1: held_by(policy, models[0])}
    stream = engine.generate(asked(24, 2), Sampling(1.0, 1.0, 400, (STOP,)))
    groups = [next(stream)]
    phases.to_policy(policy, contextlib.nullcontext)
    [server] = engine._fleet.servers
    assert server.released == {WEIGHTS, CACHES}
    with pytest.raises(
        RuntimeError, match=r"release: the engines sleep, .* on the device; offload is next"
    ):
        phases.to_policy(policy, contextlib.nullcontext)
    # once more, behind the phases' back: nothing is asked of a server that has released all
    engine.sleep()
    with pytest.raises(RuntimeError, match="asleep"):
        next(stream)
    policy.update(
        policy.pack_update(ragged_sequences(8), list(range(8)), 400, "token"), supervised_loss
    )
    phases.to_engines(policy, 2, contextlib.nullcontext)
    assert server.released == set()
    by_version[2] = held_by(policy, models[0])
    groups += stream
    assert len(groups) == 24
    worst, wrong, kinds = 0.0, 0.0, set()
    for group in groups:
        for response in group.responses:
            kinds.add(tuple(span.version for span in response.versions))
            assert all(a.end == b.start for a, b in pairwise(response.versions))
            for version, start, end in response.versions:
                said = torch.tensor(response.logprobs[start:end])
                exact = {
                    v: exact_logprobs(m, group.prompt, response.tokens, 1.0)
                    for v, m in by_version.items()
                }
                worst = max(worst, (exact[version][start:end] - said).abs().max().item())
                wrong = max(wrong, (exact[3 - version][start:end] - said).abs().max().item())
    print(f"spans {sorted(kinds)}: {worst:.1e} from their own weights, {wrong:.1e} from the others")
    assert worst <= TOLERANCE < wrong
    assert {(1,), (1, 2)} <= kinds


@pytest.mark.slow
def test_after_a_publication_that_failed_twice_the_server_is_paused_and_answers_nothing(
    engine: SGLangEngine, folders: tuple[Path, Path], ranks: Ranks
) -> None:
    phases, policy = sharing(engine, Failing(engine), folders[0], ranks)
    with pytest.raises(EngineError, match="no memory for the third bucket"):
        phases.to_engines(policy, 1, contextlib.nullcontext)
    assert phases.state is State.AWAKE
    assert engine.version == -1
    [server] = engine._fleet.servers
    assert server.released == {CACHES}
    for call in (engine.resume, lambda: engine.generate(asked(2, 1), Sampling(1.0, 1.0, 4, ()))):
        with pytest.raises(RuntimeError, match=r"publish\(\)"):
            call()
    with pytest.raises(EngineError, match="503"):
        engine._thread.run(server._get("/health", "health_s"))
