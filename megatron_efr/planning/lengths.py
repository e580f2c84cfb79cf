"""Lengths that responses may have, and how many of them are decoded in each step."""

from __future__ import annotations

import heapq
from bisect import bisect

import numpy as np
from numpy.typing import NDArray

GRID = 10**9  # parts of 1 in which a probability is sought


def geometric(mean: float, most: int, count: int) -> NDArray[np.int64]:
    """Lengths in tokens of `count` responses that end with the same probability after each token,
    and at `most`; their expected length is `mean`, from 1 to `most`.

    Quantiles in a fixed random order: the longest is as long as that of so many is likely to be.
    """
    if mean in (1, most):
        return np.full(count, mean, dtype=np.int64)
    # the expected length is the sum of the probabilities that a token comes at all
    before = np.arange(most)
    found = bisect(range(GRID), mean, key=lambda n: ((n / GRID) ** before).sum())
    longer = (np.arange(count) + 0.5) / count  # part of the responses that are longer
    lengths = np.ceil(np.log(longer) / np.log(found / GRID)).clip(1, most).astype(np.int64)
    return np.random.default_rng(0).permutation(lengths)


def rows_of_steps(steps: NDArray[np.int64], slots: int) -> NDArray[np.int64]:
    """Rows that are decoded in each step, of `slots`, if a response takes so many `steps` and the
    next one begins in the row of the first that ended.
    """
    free = [0] * slots  # when each row will be
    begun = []
    for taken in steps.tolist():
        begun.append(free[0])
        heapq.heapreplace(free, free[0] + taken)
    size = max(free) + 1
    changes = np.bincount(begun, minlength=size) - np.bincount(begun + steps, minlength=size)
    return changes.cumsum()[:-1]
