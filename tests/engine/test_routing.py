"""A real server's mixture of experts: published to, checked, and replayed by the policy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_efr.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_efr.errors import WeightMismatchError
from megatron_efr.policy import Policy, Ranks
from megatron_efr.policy.packing import samples
from megatron_efr.publication.sglang_layout import EngineLayout
from megatron_efr.rollout.sglang.engine import SGLangEngine
from megatron_efr.samples import Sample
from megatron_efr.scripts import plain
from megatron_efr.types import Prompt, Sampling
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import FolderWeights
from tests.engine.conftest import SLOTS, rollout, start
from tests.engine.published import make_policy, make_publisher
from tests.engine.test_publish import Lying, train
from tests.groups import credited
from tests.routing import as_sampled_by, change_weights, make_moe_folder

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=60, stop_ids=(2,))


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe_folder(tmp_path_factory.mktemp("models") / "moe")


@pytest.fixture(scope="module")
def server(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    launcher, urls = start(tmp_path_factory.mktemp("engines"), rollout(), moe, routing="replay")
    with launcher:
        yield urls[0], launcher.key


@pytest.fixture
def engine(server: tuple[str, str], moe: Path) -> Iterator[SGLangEngine]:
    url, key = server
    made = SGLangEngine(
        [url],
        Architecture.from_folder(moe),
        SLOTS,
        rollout().timeouts,
        key=key,
        routed_experts=True,
    )
    yield made
    made.close()


def weights(folder: Path, noise: float) -> Iterator[tuple[str, torch.Tensor]]:
    """The folder's, each off by a normal relative error."""
    architecture = Architecture.from_folder(folder)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in FolderWeights(folder, architecture).items():
        yield name, tensor * (1 + noise * torch.randn(tensor.shape, generator=generator))


def sampled(engine: SGLangEngine) -> list[Sample]:
    """Responses to prompts with common beginnings, which the server reads once."""
    prompts = [Prompt(str(i), (5, 6, 7, 8, 9, 10 + i, 11, 12), "", "") for i in range(6)]
    groups = list(
        engine.generate([plain(prompt, 8, seed) for seed, prompt in enumerate(prompts)], SAMPLING)
    )
    return samples([credited(group, np.zeros(8)) for group in groups])


def differences(policy: Policy, sequences: list[Sample]) -> tuple[float, float]:
    """Mean and maximum of |engine - policy|, as training measures them."""
    batches = policy.pack_update(sequences, list(range(len(sequences))), 2000, "token")
    policy.score(batches)
    (version,) = {int(v) for sequence in sequences for v in sequence.columns["version"]}
    found = policy.compare_logprobs(batches, version)
    return found["logprob_diff_mean"], found["logprob_diff_max"]


def test_replay_removes_what_flipped_experts_add(
    engine: SGLangEngine, moe: Path, ranks: Ranks
) -> None:
    own, replay = (
        Policy(
            ModelConfig(path=str(moe), routing=routing), ParallelConfig(), OptimizerConfig(lr=1e-3),
            ranks,
            updates=1, seed=0,
        )
        for routing in ("own", "replay")
    )  # fmt: skip
    engine.publish(weights(moe, 0.0), 1)
    sequences = sampled(engine)
    assert all(
        s.routed_experts is not None and s.routed_experts.dtype == np.int8 for s in sequences
    )
    chosen, _ = as_sampled_by(own, sequences, budget=2000)
    flips = np.mean([_flips(a, b) for a, b in zip(sequences, chosen, strict=True)])
    exact = differences(replay, sequences)
    print(
        f"same weights: {flips:.3%} of tokens flip; replay: mean {exact[0]:.1e}, max {exact[1]:.1e}"
    )
    assert flips < 1e-3, (
        "an engine in fp32 chooses as the policy does: layers, tokens and experts are in their "
        "places"
    )
    assert exact[1] < 1e-5

    engine.publish(weights(moe, 1e-4), 2)
    sequences = sampled(engine)
    apart, together = differences(own, sequences), differences(replay, sequences)
    print(
        f"noise of 1e-4: own mean {apart[0]:.1e}, max {apart[1]:.1e}; replay {together[0]:.1e}, "
        f"{together[1]:.1e}"
    )
    assert together[0] < apart[0] / 1.3
    assert together[1] < apart[1] / 5


def _flips(one: Sample, other: Sample) -> float:
    assert one.routed_experts is not None
    assert other.routed_experts is not None
    return float((np.sort(one.routed_experts) != np.sort(other.routed_experts)).any((1, 2)).mean())


def test_experts_that_ranks_share_reach_the_server(
    server: tuple[str, str], moe: Path, tmp_path: Path
) -> None:
    other = change_weights(moe, tmp_path / "other", lambda name, weight: weight * 1.2)
    train(server, (moe, other), ["expert=2:tensor", "expert=2:distributed"], processes=2)


def test_an_expert_that_the_server_has_otherwise_or_ignored_stops_the_run(
    engine: SGLangEngine, moe: Path, ranks: Ranks
) -> None:
    layout, policy = EngineLayout(engine.architecture, 1), make_policy(moe, "tensor=1", ranks)
    layer = "model.layers.2.mlp.experts."

    def wrong(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        return name, tensor * (1.001 if name == f"{layer}5.down_proj.weight" else 1.0)

    def unknown(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        return (
            (f"{layer}16.up_proj.weight", tensor * 2)
            if name == f"{layer}5.up_proj.weight"
            else (name, tensor)
        )

    with pytest.raises(
        WeightMismatchError, match=r"model\.layers\.2\.mlp\.experts\.w2_weight is not what was sent"
    ):
        make_publisher(Lying(engine, wrong), engine, layout, ranks).publish(policy, 3)
    engine.publish(weights(moe, 1e-4), 4)
    with pytest.raises(
        WeightMismatchError,
        match=r"model\.layers\.2\.mlp\.experts\.w13_weight is not what was sent",
    ):
        make_publisher(Lying(engine, unknown), engine, layout, ranks).publish(policy, 5)
    assert engine.version == -1
