"""RLOO: the baseline of a response is the mean reward of the prompt's other responses."""

from __future__ import annotations

import numpy as np


def rloo(rewards: np.ndarray) -> np.ndarray:
    """Advantage r_i - mean_{j != i} r_j over the last axis, float64, `[samples]` or `[prompts, samples]`.

    Arora & Zanette 2025, section 4; Ahmadian et al. 2024. ValueError for fewer than two samples.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    samples = rewards.shape[-1]
    if samples < 2:
        raise ValueError(f"RLOO needs at least 2 samples of a prompt, got {samples}")
    # r_i - (sum - r_i) / (n - 1) = (r_i - mean) * n / (n - 1)
    return (rewards - rewards.mean(axis=-1, keepdims=True)) * (samples / (samples - 1))
