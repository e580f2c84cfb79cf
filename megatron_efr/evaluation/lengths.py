"""Measures of tokens and of what they cost."""

from __future__ import annotations

import numpy as np

from megatron_efr.evaluation import statistics
from megatron_efr.evaluation.measure import (
    MEASURES,
    Measure,
    over_problems,
    pooled,
    ratio,
    register,
)
from megatron_efr.evaluation.samples import Samples
from megatron_efr.types import FloatArray


@register("tokens", "low")
def tokens(samples: Samples) -> FloatArray:
    """Drawn tokens of a response, right, wrong or cut off; those that a script wrote are not
    counted.
    """
    return over_problems(samples.mean(samples.tokens))


@register("tokens", "low")
def tokens_right(samples: Samples) -> FloatArray:
    """Mean tokens over all right responses."""
    return pooled(samples, samples.tokens, samples.correct)


@register("tokens", "low")
def tokens_wrong(samples: Samples) -> FloatArray:
    """Mean tokens over all wrong responses, those that were cut off among them."""
    return pooled(samples, samples.tokens, ~samples.correct)


@register("tokens", "low")
def tokens_per_right_answer(samples: Samples) -> FloatArray:
    """Mean tokens / accuracy: tokens spent for each right answer, however they lie over the
    problems.
    """
    return np.stack([samples.mean(samples.tokens), samples.mean(samples.correct)], axis=1)


def cost_of_pass(prices: tuple[float, float] = (0.0, 1.0), unit: str = "tokens") -> Measure:
    """Cost of one right answer, mean over problems of (n_in p_in + n_out p_out) / pass rate (arXiv
    2504.13359, eq. 1).

    `prices` are of a token read and of one drawn, in `unit`. It is infinite if a problem is never
    solved, which the source makes an error (mhamzaerol/Cost-of-Pass@6eb7889). By default it counts
    drawn tokens.
    """

    def terms(samples: Samples) -> FloatArray | None:
        read = samples.prompt_tokens
        if read is None and prices[0]:
            return None
        spent = samples.mean(samples.tokens) * prices[1] + (
            0.0 if read is None else read * prices[0]
        )
        rates = samples.mean(samples.correct)
        never = rates == 0
        return np.stack([spent / np.where(never, 1.0, rates), np.ones(len(rates)), never], axis=1)

    def value(sums: FloatArray) -> FloatArray:
        return np.where(sums[..., 2] > 0, np.inf, ratio(sums[..., :2]))

    return Measure("cost_of_pass", unit, "low", terms, value, about=cost_of_pass.__doc__ or "")


def _hard_over_easy(sums: FloatArray) -> FloatArray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return ratio(sums[..., :2]) / ratio(sums[..., 2:])


@register("x", "neither", _hard_over_easy)
def hard_easy_ratio(samples: Samples) -> FloatArray | None:
    """Mean tokens on the harder half of the difficulties over those on the easier half; the middle
    one is in neither.

    It takes difficulties with a number in them. Compute follows difficulty if it is above 1.
    """
    levels = statistics.in_order({level for level in samples.difficulties if level is not None})
    if len(levels) < 2 or not all(
        any(character.isdigit() for character in level) for level in levels
    ):
        return None
    half = len(levels) // 2
    spent = samples.mean(samples.tokens)
    hard, easy = (
        np.array([level in part for level in samples.difficulties], dtype=np.float64)
        for part in (levels[-half:], levels[:half])
    )
    return np.stack([spent * hard, hard, spent * easy, easy], axis=1)


MEASURES["cost_of_pass"] = cost_of_pass()
