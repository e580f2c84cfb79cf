"""Figures with their intervals: bootstrap over problems, seeded; Wilson's for rates, which knows
their ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from megatron_efr.evaluation import statistics
from megatron_efr.evaluation.measure import Measure
from megatron_efr.evaluation.measures import offered
from megatron_efr.evaluation.samples import Samples
from megatron_efr.types import FloatArray


class Figure(NamedTuple):
    """A value and its 95% interval; None if it is not finite, such as a ratio to nothing."""

    value: float | None
    low: float | None = None
    high: float | None = None


def measured(
    samples: Samples, measures: Sequence[Measure] | None = None, seed: int = 0
) -> dict[str, Figure]:
    """The figures of these measures, or of all, by name; those that the samples do not say enough
    for are missing.
    """
    asked = offered(samples) if measures is None else measures
    parts = [(measure, terms) for measure in asked if (terms := measure.terms(samples)) is not None]
    if not parts:
        return {}
    drawn = resampled(np.concatenate([terms for _, terms in parts], axis=1), seed)
    return figures_of(parts, drawn, len(samples.tokens))


def figures_of(
    parts: Sequence[tuple[Measure, FloatArray]], drawn: FloatArray, samples: int
) -> dict[str, Figure]:
    """The figures of measures with their `terms` [problems, terms], by name.

    `drawn` [resamples, all terms] are the sums of these over draws of the problems; `samples` are
    counted in all.
    """
    ends = np.cumsum([terms.shape[1] for _, terms in parts])[:-1]
    return {
        measure.name: _figure(measure, terms, own, samples)
        for (measure, terms), own in zip(parts, np.split(drawn, ends, axis=1), strict=True)
    }


def _figure(measure: Measure, terms: FloatArray, drawn: FloatArray, samples: int) -> Figure:
    value = float(measure.value(summed(terms)))
    if not np.isfinite(value):
        return Figure(None)
    if measure.rate:
        rates = terms[:, 0][terms[:, 1] > 0]
        return Figure(
            value, *statistics.rate_interval(rates, math.inf if measure.fractional else samples)
        )
    return Figure(value, *spread(measure.value(drawn)))


def with_interval(
    text: str, low: float | None, high: float | None, write: Callable[[float], str]
) -> str:
    """A figure's `text` with its interval behind it, `92.0% [90.1, 93.6]`; alone if it has none."""
    return text if low is None or high is None else f"{text} [{write(low)}, {write(high)}]"


def summed(terms: FloatArray) -> FloatArray:
    """Sums of `terms` [problems, terms] over the problems, each pairwise as `np.mean` does it."""
    return np.ascontiguousarray(terms.T).sum(axis=1)


def spread(values: FloatArray) -> tuple[float | None, float | None]:
    """The 95% percentile interval of drawn values; those that are not finite are left out, None if
    all are.
    """
    known = values[np.isfinite(values)]
    if not len(known):
        return None, None
    tail = (1 - statistics.LEVEL) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return float(low), float(high)


def resampled(terms: FloatArray, seed: int, resamples: int = statistics.RESAMPLES) -> FloatArray:
    """Sums of `terms` [problems, terms] over draws of the problems with replacement, [resamples,
    terms].

    Resampling problems, not responses, makes the interval clustered: responses to one problem are
    not independent.
    """
    return np.concatenate([counts @ terms for counts in _counts(len(terms), seed, resamples)])


def _counts(problems: int, seed: int, resamples: int) -> Iterator[FloatArray]:
    """Number of times each problem is drawn, [some, problems] at a time."""
    for draws in statistics.drawn_problems(problems, seed, resamples):
        places = draws + problems * np.arange(len(draws))[:, None]
        yield (
            np.bincount(places.ravel(), minlength=draws.size)
            .reshape(draws.shape)
            .astype(np.float64)
        )
