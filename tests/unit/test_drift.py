"""Three log-probs of a token: importance weights and the loss under them against fp64, differences by version lag."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from megatron_efr import algorithms
from megatron_efr.algorithms import Importance, Objective
from megatron_efr.config import ConfigError, TrainConfig, TrainingConfig
from megatron_efr.config.file import dump, validate
from megatron_efr.policy.drift import drift_figures, drift_sums, engine_logprobs, fill_importance, version_lags
from megatron_efr.policy.handover import flatten, unflatten
from megatron_efr.policy.head import Head, HeadRows
from megatron_efr.policy.loss import policy_loss
from megatron_efr.policy.packing import pack
from megatron_efr.report.iteration import LogprobMismatchError, check_logprobs
from megatron_efr.types import PackedBatch, Sequence, VersionSpan
from tests.conftest import VOCAB, ragged_sequences

CPU = torch.device("cpu")
BF16 = {"path": "m", "dtype": "bfloat16"}


def packed(sequences: list[Sequence], off: float, seed: int = 0) -> PackedBatch:
    """One micro-batch of them all whose proximal log-probs are the engine's plus noise of that size."""
    rng = np.random.default_rng(seed)
    batch = pack(sequences, list(range(len(sequences))), dict.fromkeys(range(len(sequences)), 0.01), CPU)
    engine = np.concatenate([np.array(s.engine_logprobs, np.float32) for s in sequences])
    batch.old_logprobs = torch.from_numpy(engine + off * rng.normal(size=engine.shape).astype(np.float32))
    batch.advantages = torch.from_numpy(rng.normal(size=engine.shape).astype(np.float32))
    return batch


@pytest.mark.parametrize("rule", ["none", "truncate", "mask"])
def test_the_loss_and_its_gradient_under_importance_weights_equal_fp64(rule: Any) -> None:
    torch.manual_seed(0)
    sequences = ragged_sequences(12)
    batch = packed(sequences, off=1.0)
    assert batch.old_logprobs is not None
    assert batch.advantages is not None
    states = torch.randn(len(batch.old_logprobs), 16, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(VOCAB, 16))
    with torch.no_grad():  # engine and proximal log-probs around the current ones, so that nothing is all clipped
        now = torch.log_softmax(states @ weight.T, -1).gather(1, batch.targets[:, None])[:, 0]
        shift = now + 0.3 * torch.randn(now.shape) - batch.old_logprobs
        batch.old_logprobs += shift
    moved = [s + v for s, v in zip(engine_logprobs(batch, sequences).split(batch.row_lengths),
                                   shift.split(batch.row_lengths), strict=True)]  # fmt: skip
    sequences = [replace(s, engine_logprobs=part.tolist()) for s, part in zip(sequences, moved, strict=True)]
    fill_importance([batch], sequences, Importance(rule, 1.5, 0.4, 3.0))
    head = Head(weight, VOCAB, 1.0, None, sequence_parallel=False, chunk=64, backend="torch")
    value, metrics = policy_loss(Objective())(HeadRows(head, states, batch, factor=1.0))
    value.backward()

    old, advantages = batch.old_logprobs.double(), batch.advantages.double()
    rho = torch.exp(old - engine_logprobs(batch, sequences).double())
    rho_used = {
        "none": torch.ones_like(rho),
        "truncate": rho.clamp(max=1.5),
        "mask": rho * (rho >= 0.4) * (rho <= 3.0),
    }[rule]
    exact = states.detach().double().requires_grad_()
    logprobs = torch.log_softmax(exact @ weight.detach().double().T, -1).gather(1, batch.targets[:, None])[:, 0]
    ratio = torch.exp(logprobs - old)
    wanted = -(0.01 * rho_used * torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)).sum()
    wanted.backward()
    assert exact.grad is not None
    assert states.grad is not None
    assert value.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert (states.grad - exact.grad).abs().max() <= 1e-5 * exact.grad.abs().max()
    assert 0 < metrics["clip_fraction"] < 0.01 * len(rho)
    if rule == "mask":
        assert 0.1 < (rho_used == 0).double().mean() < 0.6


@pytest.mark.parametrize("rule", ["truncate", "mask"])
def test_a_weight_is_exactly_one_where_engine_and_policy_agree_exactly(rule: Literal["truncate", "mask"]) -> None:
    sequences = ragged_sequences(6)
    batch = packed(sequences, off=0.0)
    fill_importance([batch], sequences, Importance(rule))
    assert batch.importance is not None
    assert torch.equal(batch.importance, torch.ones_like(batch.importance))
    assert not batch.importance.requires_grad
    figures = drift_figures(drift_sums(batch, sequences, version=0))
    assert figures["importance_mean"] == 1.0
    assert figures["importance_cut"] == 0.0


def test_differences_are_told_apart_by_the_version_that_drew_the_token() -> None:
    plain = ragged_sequences(8)
    offsets = {5: 0.5, 6: 0.25, 7: 0.125}  # by version; the policy is version 7
    sequences = []
    for s in plain:
        a, b = s.response_length // 3, 2 * s.response_length // 3
        spans = [VersionSpan(5, 0, a), VersionSpan(6, a, b), VersionSpan(7, b, s.response_length)]
        spans = [span for span in spans if span.start < span.end]
        sequences.append(replace(s, versions=tuple(spans)))
    batch = packed(sequences, off=0.0)
    lags = version_lags(batch, sequences, version=7)
    assert batch.old_logprobs is not None
    batch.old_logprobs = batch.old_logprobs + torch.tensor([0.125, 0.25, 0.5])[lags]
    figures = drift_figures(drift_sums(batch, sequences, version=7))
    for lag, name in enumerate(["logprob_diff", "logprob_diff_lag1", "logprob_diff_lag2"]):
        assert figures[f"{name}_mean"] == pytest.approx(offsets[7 - lag], abs=1e-6)
        assert figures[f"{name}_max"] == pytest.approx(offsets[7 - lag], abs=1e-6)
    stale = drift_figures(drift_sums(batch, sequences, version=8))
    assert math.isnan(stale["logprob_diff_mean"])
    assert stale["logprob_diff_lag1_mean"] == pytest.approx(0.125, abs=1e-6)
    check_logprobs(stale, TrainingConfig(max_logprob_diff=0.01), loud=True)  # nothing that could be judged


def test_the_mean_warns_then_stops_and_the_maximum_does_neither(capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainingConfig(max_logprob_diff=0.5, warn_logprob_diff=0.2)
    check_logprobs({"logprob_diff_mean": 0.1, "logprob_diff_max": 30.0}, config, loud=True)
    assert capsys.readouterr().err == ""
    check_logprobs({"logprob_diff_mean": 0.3, "logprob_diff_max": 0.3}, config, loud=False)
    assert capsys.readouterr().err == ""
    check_logprobs({"logprob_diff_mean": 0.3, "logprob_diff_max": 0.3}, config, loud=True)
    assert "by 0.3000 on average, more than train.warn_logprob_diff = 0.2" in capsys.readouterr().err
    with pytest.raises(LogprobMismatchError, match=r"by 0\.6000 on average, more than train\.max_logprob_diff = 0\.5"):
        check_logprobs({"logprob_diff_mean": 0.6, "logprob_diff_max": 0.6}, config, loud=True)


def test_sequences_come_back_exactly_from_flat_tensors() -> None:
    rng = np.random.default_rng(0)
    sequences = [
        replace(
            s,
            advantage=float(rng.normal()) * 1e-3,
            engine_logprobs=np.asarray(s.engine_logprobs, np.float32).tolist(),
            versions=(VersionSpan(10**12, 0, 1), VersionSpan(10**12 + 1, 1, s.response_length)),
            routed_experts=rng.integers(0, 60000, (s.length - 1, 3, 2)).astype(np.uint16) if s.length % 2 else None,
        )
        for s in ragged_sequences(20)
    ]
    sequences += [Sequence([1, 2, 2**31 - 1], 1), Sequence([1], 1, 0.5, [])]
    back = unflatten(flatten(sequences))
    assert [replace(s, routed_experts=None) for s in back] == [replace(s, routed_experts=None) for s in sequences]
    for given, found in zip(sequences, back, strict=True):
        if given.routed_experts is None:
            assert found.routed_experts is None
        else:
            assert found.routed_experts is not None
            assert found.routed_experts.dtype == np.uint16
            assert np.array_equal(given.routed_experts, found.routed_experts)
    assert unflatten(flatten([])) == []


def config(**sections: Any) -> TrainConfig:
    tree = {"name": "a", "model": {"path": "m"}, "data": {"datasets": [{"path": "d"}]}, "optimizer": {"lr": 1e-6}}
    return validate(TrainConfig, tree | sections, "test.yaml")


def test_importance_weights_are_on_where_rollouts_may_be_old_and_by_choice_elsewhere() -> None:
    def rule(**sections: Any) -> str:
        made = config(**sections)
        return algorithms.build(made.algorithm, made.rollout).objective(made.rollout).importance.rule

    assert rule() == "none"
    assert rule(rollout={"partial": True}) == "truncate"
    assert rule(rollout={"async": True}) == "truncate"
    assert rule(rollout={"async": True}, algorithm={"importance": "none"}) == "none"
    assert rule(algorithm={"importance": "mask"}) == "mask"
    assert "async: true" in dump(config(rollout={"async": True}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {"ahead": 3}}, r"rollout\.ahead: only partial"),
        ({"rollout": {"partial": True, "prompts": 4, "ahead": 5}}, r"rollout\.ahead: 5 .* at most"),
        ({"rollout": {"partial": True, "async": True}}, r"rollout\.max_staleness: 1 leaves"),
        ({"rollout": {"placement": "colocated", "async": True}}, r"rollout\.async: colocated engines sleep while the"),
        ({"rollout": {"overlap": True}}, r"rollout\.overlap: unknown key"),
        ({"rollout": {"asinc": True}}, r"rollout\.asinc: unknown key; did you mean async\?"),
        ({"train": {"max_logprob_diff": 0.1, "warn_logprob_diff": 0.2}}, r"train\.warn_logprob_diff: 0\.2 would warn"),
        (
            {"model": BF16, "rollout": {"engine": "sglang", "server": {"enable_fp32_lm_head": False}}},
            r"rollout\.server\.enable_fp32_lm_head: false",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_of_rollouts_is_refused_by_name(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**sections)
