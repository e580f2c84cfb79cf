"""Differences of models' means over seeds, with simultaneous intervals: apart beyond chance?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
# of the angle over which Student's density is summed: quantiles are exact to five digits
_STEPS = 20_001


class Interval(NamedTuple):
    """A figure that is known, or a difference of two, and the ends of its interval; None if it has
    no interval.
    """

    value: float
    low: float | None
    high: float | None

    @property
    def side(self) -> int:
        """1 or -1 if the interval is above or below 0, else 0."""
        return int(self.low is not None and self.low > 0) - int(
            self.high is not None and self.high < 0
        )


def differences(
    values: Mapping[str, Sequence[float]], reference: str, comparisons: int
) -> dict[str, Interval]:
    """Each model's mean less the reference's, from `values` over seeds (two or more of at least one
    model).

    The deviation is pooled: over the seeds of each model, that of its own mean, as if training's
    chance were alike in all. By Bonferroni's inequality all of `comparisons` such intervals hold
    together in 95% of cases, or more.
    """
    samples = {name: np.asarray(own, dtype=float) for name, own in values.items()}
    freedom = sum(len(own) - 1 for own in samples.values())
    squares = sum(float(((own - own.mean()) ** 2).sum()) for own in samples.values())
    reach = student(1 - (1 - LEVEL) / 2 / comparisons, freedom) * math.sqrt(squares / freedom)
    base = samples[reference]
    found = {}
    for name, own in samples.items():
        if name != reference:
            value = float(own.mean() - base.mean())
            half = reach * math.sqrt(1 / len(own) + 1 / len(base))
            found[name] = Interval(value, value - half, value + half)
    return found


def student(chance: float, freedom: int) -> float:
    """The value below which Student's t of `freedom` degrees lies with this `chance`, above 1/2.

    With t = sqrt(freedom) tan(a), the angle a has a density proportional to cos(a)^(freedom - 1).
    """
    angles = np.linspace(0.0, math.pi / 2, _STEPS)
    density = np.cos(angles) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(
        float(np.interp((2 * chance - 1) * below[-1], below, angles))
    )
