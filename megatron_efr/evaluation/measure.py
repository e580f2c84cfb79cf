"""A measure: a figure of an evaluation's samples, as a function of sums over problems; and the
registry of all.

As sums, every figure, also of two models, is resampled by the same draws of problems.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from megatron_efr.evaluation.samples import Samples
from megatron_efr.types import FloatArray

Better = Literal["high", "low", "neither"]
Terms = Callable[[Samples], FloatArray | None]
Value = Callable[[FloatArray], FloatArray]


def ratio(sums: FloatArray) -> FloatArray:
    """The first of two sums over the second, [..., 2] -> [...]; nan if that is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(sums[..., 1] == 0, np.nan, sums[..., 0] / sums[..., 1])


class Measure(NamedTuple):
    """A figure of samples: `value` [..., terms] -> [...] of the sums of `terms` [problems, terms]
    over problems.

    `terms` gives None if the samples do not say what it needs. A `rate` is a mean over problems of
    values in [0, 1]; it is `fractional` if one response may have any of them, and not 0 or 1 alone.
    `better` says which way is better. `about` is the formula, with source and unit.
    """

    name: str
    unit: str
    better: Better
    terms: Terms
    value: Value = ratio
    rate: bool = False
    about: str = ""
    fractional: bool = False


MEASURES: dict[str, Measure] = {}
"""Every measure without a number, by name."""

NUMBERED: dict[str, Callable[[int], Measure]] = {}
"""Measures that take a number, written NAME@NUMBER."""


def register(
    unit: str, better: Better, value: Value = ratio, *, rate: bool = False, fractional: bool = False
) -> Callable[[Terms], Terms]:
    """Give a function of samples its place in MEASURES, under its own name; its docstring is what
    is said about it.
    """

    def add(terms: Terms) -> Terms:
        about = terms.__doc__ or ""
        MEASURES[terms.__name__] = Measure(
            terms.__name__, unit, better, terms, value, rate, about, fractional
        )
        return terms

    return add


def over_problems(values: FloatArray) -> FloatArray:
    """Terms of the mean over problems of `values` [problems]; nan: the problem does not count."""
    counts = np.isfinite(values)
    return np.stack([np.where(counts, values, 0.0), counts], axis=1)


def pooled(samples: Samples, values: np.ndarray, among: np.ndarray | None = None) -> FloatArray:
    """Terms of the mean of `values` [samples] over all responses, or `among` those that are
    marked.
    """
    weight = np.ones(len(values)) if among is None else among.astype(np.float64)
    return np.stack([samples.total(values * weight), samples.total(weight)], axis=1)
