"""Three log-probs of a token: importance weights and the loss under them against fp64, differences
by version lag.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch

from megatron_efr import algorithms
from megatron_efr.algorithms import Importance, Objective
from megatron_efr.config import ConfigError, TrainConfig, TrainingConfig
from megatron_efr.config.file import dump, validate
from megatron_efr.policy.head import Head, HeadRows
from megatron_efr.policy.logprob_check import (
    drift_figures,
    drift_sums,
    fill_importance,
    version_lags,
)
from megatron_efr.policy.loss import policy_loss
from megatron_efr.policy.packing import pack
from megatron_efr.run.iteration import LogprobMismatchError, check_logprobs
from megatron_efr.samples import NOT_DRAWN, PackedBatch, Sample
from tests.conftest import VOCAB, ragged_sequences
from tests.groups import with_columns

CPU = torch.device("cpu")
BF16 = {"path": "m", "dtype": "bfloat16"}


def packed(sequences: list[Sample], off: float, seed: int = 0) -> PackedBatch:
    """One micro-batch of them all whose proximal log-probs are the engine's plus noise of that
    size.
    """
    rng = np.random.default_rng(seed)
    batch = pack(
        sequences, list(range(len(sequences))), dict.fromkeys(range(len(sequences)), 0.01), CPU
    )
    engine = np.concatenate([s.columns["engine_logprob"] for s in sequences])
    batch.columns["old_logprob"] = torch.from_numpy(
        engine + off * rng.normal(size=engine.shape).astype(np.float32)
    )
    batch.columns["advantage"] = torch.from_numpy(rng.normal(size=engine.shape).astype(np.float32))
    return batch


@pytest.mark.parametrize("rule", ["none", "truncate", "mask"])
def test_the_loss_and_its_gradient_under_importance_weights_equal_fp64(rule: Any) -> None:
    torch.manual_seed(0)
    sequences = ragged_sequences(12)
    batch = packed(sequences, off=1.0)
    states = torch.randn(len(batch.columns["old_logprob"]), 16, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(VOCAB, 16))
    # engine and proximal log-probs around the current ones, so that nothing is all clipped
    with torch.no_grad():
        now = torch.log_softmax(states @ weight.T, -1).gather(1, batch.targets[:, None])[:, 0]
        shift = now + 0.3 * torch.randn(now.shape) - batch.columns["old_logprob"]
        batch.columns["old_logprob"] += shift
        batch.columns["engine_logprob"] += shift
    fill_importance([batch], Importance(rule, 1.5, 0.4, 3.0))
    head = Head(weight, VOCAB, 1.0, None, sequence_parallel=False, chunk=64, backend="torch")
    value, metrics = policy_loss(Objective())(HeadRows(head, states, batch, factor=1.0))
    value.backward()

    old, advantages = batch.columns["old_logprob"].double(), batch.columns["advantage"].double()
    rho = torch.exp(old - batch.columns["engine_logprob"].double())
    rho_used = {
        "none": torch.ones_like(rho),
        "truncate": rho.clamp(max=1.5),
        "mask": rho * (rho >= 0.4) * (rho <= 3.0),
    }[rule]
    exact = states.detach().double().requires_grad_()
    logprobs = torch.log_softmax(exact @ weight.detach().double().T, -1).gather(
        1, batch.targets[:, None]
    )[:, 0]
    ratio = torch.exp(logprobs - old)
    wanted = -(
        0.01 * rho_used * torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    ).sum()
    wanted.backward()
    assert exact.grad is not None
    assert states.grad is not None
    assert value.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert (states.grad - exact.grad).abs().max() <= 1e-5 * exact.grad.abs().max()
    assert 0 < metrics["clip_fraction"] < 0.01 * len(rho)
    if rule == "mask":
        assert 0.1 < (rho_used == 0).double().mean() < 0.6


@pytest.mark.parametrize("rule", ["truncate", "mask"])
def test_a_weight_is_exactly_one_where_engine_and_policy_agree_exactly(
    rule: Literal["truncate", "mask"],
) -> None:
    sequences = ragged_sequences(6)
    batch = packed(sequences, off=0.0)
    fill_importance([batch], Importance(rule))
    assert torch.equal(batch.columns["importance"], torch.ones_like(batch.columns["importance"]))
    assert not batch.columns["importance"].requires_grad
    figures = drift_figures(drift_sums(batch, version=0))
    assert figures["importance_mean"] == 1.0
    assert figures["importance_cut"] == 0.0


def test_differences_are_told_apart_by_the_version_that_drew_the_token() -> None:
    plain = ragged_sequences(8)
    offsets = {5: 0.5, 6: 0.25, 7: 0.125}  # by version; the policy is version 7
    sequences = []
    for s in plain:
        a, b = s.response_length // 3, 2 * s.response_length // 3
        sequences.append(
            with_columns(s, version=[5] * a + [6] * (b - a) + [7] * (s.response_length - b))
        )
    batch = packed(sequences, off=0.0)
    lags = version_lags(batch, version=7)
    batch.columns["old_logprob"] = (
        batch.columns["old_logprob"] + torch.tensor([0.125, 0.25, 0.5])[lags]
    )
    figures = drift_figures(drift_sums(batch, version=7))
    for lag, name in enumerate(["logprob_diff", "logprob_diff_lag1", "logprob_diff_lag2"]):
        assert figures[f"{name}_mean"] == pytest.approx(offsets[7 - lag], abs=1e-6)
        assert figures[f"{name}_max"] == pytest.approx(offsets[7 - lag], abs=1e-6)
    stale = drift_figures(drift_sums(batch, version=8))
    assert math.isnan(stale["logprob_diff_mean"])
    assert stale["logprob_diff_lag1_mean"] == pytest.approx(0.125, abs=1e-6)
    # nothing that could be judged
    check_logprobs(stale, TrainingConfig(max_logprob_diff=0.01), loud=True)


def test_the_mean_warns_then_stops_and_the_maximum_does_neither(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = TrainingConfig(max_logprob_diff=0.5, warn_logprob_diff=0.2)
    check_logprobs({"logprob_diff_mean": 0.1, "logprob_diff_max": 30.0}, config, loud=True)
    assert capsys.readouterr().err == ""
    check_logprobs({"logprob_diff_mean": 0.3, "logprob_diff_max": 0.3}, config, loud=False)
    assert capsys.readouterr().err == ""
    check_logprobs({"logprob_diff_mean": 0.3, "logprob_diff_max": 0.3}, config, loud=True)
    assert (
        "by 0.3000 on average, more than train.warn_logprob_diff = 0.2"
    ) in capsys.readouterr().err
    with pytest.raises(
        LogprobMismatchError,
        match=r"by 0\.6000 on average, more than train\.max_logprob_diff = 0\.5",
    ):
        check_logprobs({"logprob_diff_mean": 0.6, "logprob_diff_max": 0.6}, config, loud=True)


def test_tokens_that_no_engine_drew_are_not_compared() -> None:
    """Neither in the differences nor in the KL, and their importance is 1."""
    plain = ragged_sequences(8)
    sequences = [
        with_columns(s, version=[NOT_DRAWN if t % 3 == 0 else 2 for t in range(s.response_length)])
        for s in plain
    ]
    batch = packed(sequences, off=0.5)
    written = batch.columns["version"] == NOT_DRAWN
    batch.columns["engine_logprob"][written] = -torch.inf
    batch.columns["reference_logprob"] = torch.where(
        written, torch.nan, batch.columns["old_logprob"] - 0.25
    )
    fill_importance([batch], Importance("truncate", 1.5))
    figures = drift_figures(drift_sums(batch, version=2))
    off = (batch.columns["old_logprob"] - batch.columns["engine_logprob"])[~written].double()
    assert figures["logprob_diff_mean"] == pytest.approx(float(off.abs().mean()), rel=1e-6)
    assert figures["kl"] == pytest.approx(0.25, abs=1e-6)
    assert figures["importance_mean"] == pytest.approx(
        float(off.exp().clamp(max=1.5).mean()), rel=1e-6
    )
    assert set(batch.columns["importance"][written].tolist()) == {1.0}


def config(**sections: Any) -> TrainConfig:
    tree = {
        "name": "a",
        "model": {"path": "m"},
        "data": {"datasets": [{"path": "d"}]},
        "optimizer": {"lr": 1e-6},
    }
    return validate(TrainConfig, tree | sections, "test.yaml")


def test_importance_weights_are_on_where_rollouts_may_be_old_and_by_choice_elsewhere() -> None:
    def rule(**sections: Any) -> str:
        made = config(**sections)
        return (
            algorithms.build(made.algorithm, made.rollout).objective(made.rollout).importance.rule
        )

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
        ({"rollout": {"partial": True, "async": True}}, r"rollout\.max_staleness: 1 lets"),
        ({"rollout": {"placement": "colocated", "async": True}},
            r"rollout\.async: colocated engines sleep while the"),
        ({"rollout": {"overlap": True}}, r"rollout\.overlap: unknown key"),
        ({"rollout": {"asinc": True}}, r"rollout\.asinc: unknown key; did you mean async\?"),
        ({"train": {"max_logprob_diff": 0.1, "warn_logprob_diff": 0.2}},
            r"train\.warn_logprob_diff: 0\.2 would warn"),
        (
            {"model": BF16, "rollout": {"engine": "sglang",
                "server": {"enable_fp32_lm_head": False}}},
            r"rollout\.server\.enable_fp32_lm_head: false",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_of_rollouts_is_refused_by_name(
    sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**sections)
