"""Measures of one model against another, the base, on the same problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from megatron_efr.evaluation import statistics
from megatron_efr.evaluation.measure import Better, Terms
from megatron_efr.evaluation.samples import Samples
from megatron_efr.types import FloatArray


class Relative(NamedTuple):
    """A figure of two models: `value` of the sums of both's `terms` over the same problems, [...,
    terms] each.
    """

    name: str
    unit: str
    better: Better
    terms: Terms
    value: Callable[[FloatArray, FloatArray], FloatArray]
    about: str = ""


RELATIVE: dict[str, Relative] = {}
"""Every measure of a model against its base, by name."""


def _register(unit: str, better: Better, terms: Terms) -> Callable[..., Callable[..., FloatArray]]:
    def add(
        value: Callable[[FloatArray, FloatArray], FloatArray],
    ) -> Callable[[FloatArray, FloatArray], FloatArray]:
        RELATIVE[value.__name__] = Relative(
            value.__name__, unit, better, terms, value, value.__doc__ or ""
        )
        return value

    return add


def _rates_and_tokens(samples: Samples) -> FloatArray:
    """Accuracy and tokens of each problem, [problems, 2]."""
    return np.stack([samples.mean(samples.correct), samples.mean(samples.tokens)], axis=1)


def _of_datasets(column: str) -> Terms:
    """The problem's mean of a column of samples, in the place of its data set: [problems, data
    sets].
    """

    def terms(samples: Samples) -> FloatArray:
        names = sorted(set(samples.datasets))
        member = np.array(
            [[own == name for name in names] for own in samples.datasets], dtype=np.float64
        )
        return samples.mean(getattr(samples, column))[:, None] * member

    return terms


@_register("", "high", _rates_and_tokens)
def aes(own: FloatArray, base: FloatArray) -> FloatArray:
    """Accuracy-efficiency score of O1-Pruner (arXiv 2501.12570): dL + 3 |dA| if accuracy rose, dL -
    5 |dA| if it fell; dL and dA are the shares of the base's tokens that are saved and of its
    accuracy that is won. The weights (1, 3, 5) are known from others' accounts alone. 0 is the
    base.
    """
    return statistics.accuracy_efficiency_score(
        own[..., 0], own[..., 1], base[..., 0], base[..., 1]
    )


@_register("%", "high", _of_datasets("correct"))
def accuracy_normalised(own: FloatArray, base: FloatArray) -> FloatArray:
    """Accuracy over the base's, mean over data sets (arXiv 2502.04463, section 5); nan if it has
    none on one.
    """
    return statistics.mean_ratio(own, base)


@_register("%", "low", _of_datasets("tokens"))
def tokens_normalised(own: FloatArray, base: FloatArray) -> FloatArray:
    """Tokens over the base's, mean over data sets (arXiv 2502.04463, section 5)."""
    return statistics.mean_ratio(own, base)
