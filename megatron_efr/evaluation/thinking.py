"""Measures of how a model thinks: thought against answer, loops, reflection, and what it would have
said before.
"""

from __future__ import annotations

import numpy as np

from megatron_efr.evaluation.measure import (
    NUMBERED,
    Measure,
    over_problems,
    pooled,
    ratio,
    register,
)
from megatron_efr.evaluation.samples import NO_ANSWER, Samples
from megatron_efr.types import FloatArray

OAA_TOKENS = 1000
"""Thinking tokens up to which the area is taken: t_max of OptimalThinkingBench."""
_SCALE = 1 / 32768  # of tokens in a correlation: sums of squares stay near 1
_NOTHING = 1e-12  # variance that is rounding


@register("tokens", "low")
def thinking_tokens(samples: Samples) -> FloatArray | None:
    """Drawn tokens up to the end of the thought, its mark included; a response without the mark is
    all thought.
    """
    return None if samples.thinking is None else over_problems(samples.mean(samples.thinking))


@register("tokens", "low")
def answer_tokens(samples: Samples) -> FloatArray | None:
    """Drawn tokens after the thought."""
    return (
        None
        if samples.thinking is None
        else over_problems(samples.mean(samples.tokens - samples.thinking))
    )


def thinking_area(most: int) -> Measure:
    """AUC_OAA (arXiv 2508.13141): the mean over t of (0, t_max] of the share that is right with
    fewer than t thinking tokens, which is the mean of c max(0, 1 - thinking / t_max).
    """

    def terms(samples: Samples) -> FloatArray | None:
        if samples.thinking is None or not most:
            return None
        return over_problems(
            samples.mean(samples.correct * np.maximum(0.0, 1 - samples.thinking / most))
        )

    return Measure(
        f"thinking_area@{most}",
        "%",
        "high",
        terms,
        rate=True,
        about=thinking_area.__doc__ or "",
        fractional=True,
    )


@register("%", "low", rate=True)
def truncated(samples: Samples) -> FloatArray:
    """Share of responses that were cut off at the limit."""
    return over_problems(samples.mean(samples.truncated))


@register("%", "low", rate=True, fractional=True)
def repetition(samples: Samples) -> FloatArray | None:
    """Share of a response's runs of 8 tokens that stood in it before."""
    return None if samples.repetition is None else over_problems(samples.mean(samples.repetition))


@register("words", "neither")
def reflections(samples: Samples) -> FloatArray | None:
    """Reflection words in a response: wait, mistake, however, but, retry, error, verify, wrong,
    evaluate, check (the list of DeepSeek-R1, Nature 2025, extended data figure 1).
    """
    return None if samples.reflections is None else over_problems(samples.mean(samples.reflections))


def _per_thousand(sums: FloatArray) -> FloatArray:
    return 1000 * ratio(sums)


@register("words per 1,000 tokens", "neither", _per_thousand)
def reflection_density(samples: Samples) -> FloatArray | None:
    """Reflection words of all responses over their tokens."""
    if samples.reflections is None:
        return None
    return np.stack([samples.total(samples.reflections), samples.total(samples.tokens)], axis=1)


@register("%", "low")
def underthinking(samples: Samples) -> FloatArray | None:
    """Mean over wrong responses of 1 - T' / T: T tokens, T' those up to the first right thought, T
    if there is none (arXiv 2501.18585, section 4). A thought is right if at least half of the
    answers that are forced there are: this verifier and the budgets of the script `forks` in the
    place of the source's judge and its switches of thought.
    """
    if samples.early is None:
        return None
    right = samples.early >= 0.5
    first = np.array(samples.budgets)[right.argmax(axis=1)]
    score = np.where(right.any(axis=1), 1 - first / np.maximum(samples.tokens, 1), 0.0)
    return pooled(samples, np.clip(score, 0.0, 1.0), ~samples.correct)


@register("%", "neither", rate=True, fractional=True)
def internal_bias(samples: Samples) -> FloatArray | None:
    """Share of direct answers that differ from the response's: the inconsistency rate of arXiv
    2505.16448.

    Direct answers are forced before any thought (script `forks`, at 0). Who gives no answer is left
    out.
    """
    found = _deviations(samples)
    if found is None:
        return None
    deviation, known = found
    with np.errstate(invalid="ignore"):
        return over_problems(samples.total(np.where(known, deviation, 0.0)) / samples.total(known))


def _correlation(sums: FloatArray) -> FloatArray:
    """Pearson's r from [..., (n, x, y, xx, yy, xy)]; nan if one of them does not vary."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    varies = (n * xx - x * x > _NOTHING * n * n) & (n * yy - y * y > _NOTHING * n * n)
    spread = np.where(varies, (n * xx - x * x) * (n * yy - y * y), np.nan)
    return (n * xy - x * y) / np.sqrt(spread)


@register("r", "neither", _correlation)
def internal_bias_length(samples: Samples) -> FloatArray | None:
    """Pearson correlation over responses of the deviation of direct answers with tokens (arXiv
    2505.16448): above 0, responses that end elsewhere than the first guess are longer.
    """
    found = _deviations(samples)
    if found is None:
        return None
    x, known = found
    y = samples.tokens * _SCALE
    columns = (np.ones(len(y)), x, y, x * x, y * y, x * y)
    return np.stack([samples.total(np.where(known, column, 0.0)) for column in columns], axis=1)


def _deviations(samples: Samples) -> tuple[FloatArray, FloatArray] | None:
    """The share of its problem's direct answers that differ from each response's, and whether there
    are both.
    """
    if samples.direct is None or samples.answer is None:
        return None
    given = [np.array([code for code in codes if code != NO_ANSWER]) for codes in samples.direct]
    shares = [
        float(np.mean(given[index] != code)) if code != NO_ANSWER and len(given[index]) else np.nan
        for index, code in zip(samples.problem, samples.answer, strict=True)
    ]
    found = np.array(shares)
    return found, np.isfinite(found).astype(np.float64)


NUMBERED["thinking_area"] = thinking_area
