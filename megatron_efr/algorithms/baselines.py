"""Baselines and normalisation: from rewards to one advantage per response, fp64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from megatron_efr.algorithms.objective import Spread

Baseline = Literal["others", "mean", "length", "none"]


def rloo(rewards: np.ndarray) -> np.ndarray:
    """Advantage r_i - mean_{j != i} r_j over the last axis, float64, `[samples]` or `[prompts,
    samples]`.

    Ahmadian et al. 2024; Arora & Zanette 2025, section 4. ValueError for fewer than two samples.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    samples = rewards.shape[-1]
    if samples < 2:
        raise ValueError(f"RLOO needs at least 2 samples of a prompt, got {samples}")
    # r_i - (sum - r_i) / (n - 1) = (r_i - mean) * n / (n - 1)
    return (rewards - rewards.mean(axis=-1, keepdims=True)) * (samples / (samples - 1))


def above_baseline(rewards: np.ndarray, lengths: np.ndarray, baseline: Baseline) -> np.ndarray:
    """Rewards of one prompt less their baseline, float64 [n].

    others: mean of the prompt's other rewards; mean: of all; length: sum(l r) / sum(l), the one of
    least variance if each token has the same (OPO, Hao et al. 2025); none: 0. `lengths` are in
    tokens.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if baseline == "others":
        return rloo(rewards)
    if baseline == "mean":
        return rewards - rewards.mean()
    if baseline == "length":
        return rewards - (rewards * lengths).sum() / lengths.sum()
    return rewards


def divided_by_spread(values: np.ndarray, rewards: np.ndarray, spread: Spread) -> np.ndarray:
    """Values [n] divided by the spread of the same prompt's rewards [n]."""
    if spread.deviation == "others":
        return np.array(
            [
                _by_the_others(value, np.delete(rewards, i), spread)
                for i, value in enumerate(values)
            ],
            dtype=np.float64,
        )
    degrees = 1 if spread.deviation == "sample" else 0
    return values / spread.scale(float(rewards.var(ddof=degrees)))


def whitened(groups: Sequence[np.ndarray], spread: Spread) -> list[np.ndarray]:
    """Values of each group [n], less the batch's mean and divided by its spread, float64."""
    if not groups:
        return []
    values = np.concatenate(groups)
    degrees = 1 if spread.deviation == "sample" and len(values) > 1 else 0
    mean = values.mean()
    scale = spread.scale(float(values.var(ddof=degrees)))
    return [(group - mean) / scale for group in groups]


def _by_the_others(value: float, others: np.ndarray, spread: Spread) -> float:
    variance = float(others.var(ddof=1)) if len(others) > 1 else 0.0
    return value / spread.scale(variance) if variance > 0 else value
