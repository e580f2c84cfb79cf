"""Several real servers behind one engine, and one of several tensor-parallel ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_efr.config import TimeoutsConfig
from megatron_efr.rollout.sglang.engine import SGLangEngine
from megatron_efr.types import Sampling
from megatron_efr.weights.architecture import Architecture
from tests.engine.conftest import SLOTS, STOP, rollout, start
from tests.engine.test_parity import TOLERANCE, Models, asked, exact_logprobs, weights_of
from tests.engine_contract import requests


@pytest.mark.slow
def test_two_servers_share_the_work_and_one_that_dies_loses_none_of_it(
    folders: tuple[Path, Path], models: Models, tmp_path: Path
) -> None:
    config = rollout(engines=2)
    launcher, urls = start(tmp_path / "engines", config, folders[0])
    with launcher:
        engine = SGLangEngine(
            urls,
            Architecture.from_folder(folders[0]),
            SLOTS,
            TimeoutsConfig(connect_s=2),
            key=launcher.key,
        )
        engine.publish(weights_of(models[0]), version=1)
        first, second = engine.checksums()
        assert first == second
        stream = engine.generate(requests(60), Sampling(1.0, 1.0, 300, (STOP,)))
        groups = [next(stream)]
        launcher.servers[0].process.kill()
        groups += stream
        assert sorted(group.seed for group in groups) == [request.seed for request in requests(60)]
        assert {len(group.responses) for group in groups} == {2}
        assert engine.health()["resent"] > 0
        engine.publish(weights_of(models[1]), version=2)
        assert engine.urls == [urls[1]]  # the publication went to the one that is left
        engine.close()


@pytest.mark.slow
def test_a_server_of_two_ranks_serves_the_same_model(
    folders: tuple[Path, Path], models: Models, tmp_path: Path
) -> None:
    config = rollout(tp=2)
    launcher, urls = start(tmp_path / "engines", config, folders[0])
    with launcher:
        architecture = Architecture.from_folder(folders[0])
        engine = SGLangEngine(
            urls, architecture, SLOTS, config.timeouts, key=launcher.key, engine_ranks=2
        )
        engine.publish(weights_of(models[0]), version=1)
        assert {name.split(".")[0] for name in engine.checksums()[0]} == {"rank0", "rank1"}
        worst = 0.0
        for group in engine.generate(asked(6, 2), Sampling(1.0, 1.0, 40, (STOP,))):
            for response in group.responses:
                exact = exact_logprobs(models[0], group.prompt, response.tokens, 1.0)
                worst = max(worst, (exact - torch.tensor(response.logprobs)).abs().max().item())
        assert worst <= TOLERANCE
        engine.close()
