"""Rewards and advantages against hand-computed groups and an independent fp64 reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_efr import methods
from megatron_efr.algorithms import rloo
from megatron_efr.config import ConfigError, MethodConfig
from megatron_efr.methods import efr_rewards
from tests.groups import graded


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def test_reward_of_a_mixed_group_by_hand() -> None:
    # correct lengths 10 and 30: mean 20, population std 10, so z = -1 and +1
    rewards = efr_rewards(np.array([1, 0, 1]), np.array([10, 99, 30]), 0.4)
    assert rewards.tolist() == pytest.approx([1 - 0.4 * sigmoid(-1), 0.0, 1 - 0.4 * sigmoid(1)], abs=1e-7)


def test_none_one_and_all_correct() -> None:
    assert efr_rewards(np.array([0, 0]), np.array([5, 9]), 0.4).tolist() == [0.0, 0.0]
    assert efr_rewards(np.array([0, 1]), np.array([5, 9]), 0.4).tolist() == [0.0, 1 - 0.2]
    assert efr_rewards(np.array([1, 1, 1]), np.array([7, 7, 7]), 0.4).tolist() == pytest.approx([0.8] * 3, abs=1e-12)
    # lengths 1, 2, 3: mean 2, std sqrt(2/3)
    z = 1 / math.sqrt(2 / 3)
    assert efr_rewards(np.array([1, 1, 1]), np.array([1, 2, 3]), 0.2).tolist() == pytest.approx(
        [1 - 0.2 * sigmoid(-z), 0.9, 1 - 0.2 * sigmoid(z)], abs=1e-7
    )


def test_alpha_zero_is_accuracy() -> None:
    correct = np.array([[1, 0, 1], [0, 0, 0]])
    assert np.array_equal(efr_rewards(correct, np.array([[3, 4, 5], [6, 7, 8]]), 0.0), correct.astype(float))


def test_truncated_response_is_wrong_and_enters_no_statistic() -> None:
    method = methods.build(MethodConfig(name="efr", alpha=0.4), samples=3)  # type: ignore[call-arg]
    cut_off = graded([True, True, True], [10, 30, 1000], ["stop", "stop", "length"])
    assert method.rewards(cut_off).tolist() == pytest.approx(
        [1 - 0.4 * sigmoid(-1), 1 - 0.4 * sigmoid(1), 0.0], abs=1e-7
    )


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 40000)), min_size=2, max_size=16),
    st.floats(0, 0.99),
)
@settings(max_examples=200, deadline=None)
def test_reward_properties(rows: list[tuple[bool, int]], alpha: float) -> None:
    correct, lengths = np.array([c for c, _ in rows]), np.array([n for _, n in rows])
    rewards = efr_rewards(correct, lengths, alpha)
    assert np.all(rewards[~correct] == 0)
    assert np.all((rewards[correct] >= 1 - alpha) & (rewards[correct] <= 1))
    by_length = rewards[correct][np.argsort(lengths[correct], kind="stable")]
    assert np.all(np.diff(by_length) <= 1e-12), "a longer correct response never earns more"
    # an independent reading of the formula, with the standard library's statistics
    import statistics

    right = [n for c, n in rows if c]
    if right:
        mean, std = statistics.fmean(right), statistics.pstdev(right)
        expected = [c * (1 - alpha * sigmoid(max(-700.0, (n - mean) / (std + 1e-7)))) if c else 0.0 for c, n in rows]
        assert rewards.tolist() == pytest.approx(expected, abs=1e-6)


def test_tensors_and_batches_agree_with_arrays() -> None:
    rng = np.random.default_rng(0)
    correct, lengths = rng.random((5, 8)) < 0.5, rng.integers(1, 500, (5, 8))
    rows = np.stack([efr_rewards(c, n, 0.3) for c, n in zip(correct, lengths, strict=True)])
    assert np.array_equal(efr_rewards(correct, lengths, 0.3), rows)
    tensor = efr_rewards(torch.from_numpy(correct), torch.from_numpy(lengths), 0.3)
    assert isinstance(tensor, torch.Tensor)
    assert np.array_equal(tensor.numpy(), rows)


@pytest.mark.parametrize("alpha", [-0.1, 1.0, float("nan")])
def test_alpha_outside_its_range(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must lie in"):
        efr_rewards(np.array([1, 1]), np.array([1, 2]), alpha)
    with pytest.raises(ConfigError, match=r"method\.alpha"):
        methods.build(MethodConfig(name="efr", alpha=alpha), samples=8)  # type: ignore[call-arg]


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        efr_rewards(np.ones(3), np.ones(4), 0.1)


def test_rloo_by_definition() -> None:
    rewards = np.random.default_rng(1).normal(size=(6, 5))
    expected = [[row[i] - (row.sum() - row[i]) / 4 for i in range(5)] for row in rewards]
    assert np.allclose(rloo(rewards), expected, atol=1e-14)
    assert np.allclose(rloo(rewards).sum(-1), 0, atol=1e-13)


def test_rloo_needs_company() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        rloo(np.array([1.0]))
    with pytest.raises(ConfigError, match=r"rollout\.samples: 1 response"):
        methods.build(MethodConfig(name="efr", alpha=0.1), samples=1)  # type: ignore[call-arg]


def test_unknown_method_and_option_are_named() -> None:
    with pytest.raises(ConfigError, match=r"no method 'grpo'; registered: .*efr"):
        methods.build(MethodConfig(name="grpo"), samples=8)
    with pytest.raises(ConfigError, match=r"method\.alhpa: unknown key; did you mean alpha"):
        methods.build(MethodConfig(name="efr", alpha=0.1, alhpa=0.1), samples=8)  # type: ignore[call-arg]
