"""Measures of right and wrong: accuracy, votes, pass@k, and accuracy at budgets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from megatron_efr.evaluation import statistics
from megatron_efr.evaluation.measure import NUMBERED, Measure, over_problems, register
from megatron_efr.evaluation.samples import NO_ANSWER, Samples
from megatron_efr.types import BoolArray, FloatArray, IntArray


@register("%", "high", rate=True)
def accuracy(samples: Samples) -> FloatArray:
    """Share of a problem's responses that are right: avg@k over its k samples, which is pass@1."""
    return over_problems(samples.mean(samples.correct))


@register("%", "high", rate=True)
def all_right(samples: Samples) -> FloatArray:
    """Share of problems whose responses are all right: acc@k of S1-Bench
    (WYRipple/S1_Bench@f33acc7).
    """
    return over_problems((samples.total(samples.correct) == samples.sizes).astype(np.float64))


@register("%", "high", rate=True)
def answered(samples: Samples) -> FloatArray | None:
    """Share of responses that ended by themselves and have an answer that the verifier finds.

    S1-Bench's success rate, by this extractor instead of the source's formats.
    """
    return None if samples.answered is None else over_problems(samples.mean(samples.answered))


@register("%", "high", rate=True)
def majority(samples: Samples) -> FloatArray | None:
    """Chance that the most frequent answer of a problem is right; equal answers vote together, a
    tie is drawn.
    """
    return _votes(samples, lambda answers, right, tokens: statistics.majority(answers, right))


@register("%", "high", rate=True)
def shortest_majority(samples: Samples) -> FloatArray | None:
    """Chance that the answer with the most votes is right; one has count / ln(mean tokens) (arXiv
    2502.12215).
    """
    return _votes(samples, statistics.shortest_majority)


def _votes(samples: Samples, elect: Callable[..., float]) -> FloatArray | None:
    """Terms of the mean over problems of `elect`'s verdict on each one's answers, rightness and
    tokens.
    """
    if samples.answer is None:
        return None
    columns = (
        samples.split(column) for column in (samples.answer, samples.correct, samples.tokens)
    )
    cast = (
        ([None if a == NO_ANSWER else int(a) for a in own], *more)
        for own, *more in zip(*columns, strict=True)
    )
    return over_problems(np.array([elect(*each) for each in cast]))


def short(most: int) -> Measure:
    """Chance that short-m@k is right: of a problem's k samples the first m that end their thought
    vote, and of equals the shortest wins (arXiv 2505.17813, section 4.1). Without thoughts, those
    that end first.
    """

    def terms(samples: Samples) -> FloatArray | None:
        if samples.answer is None or not 0 < most <= samples.sizes.min():
            return None
        lengths = samples.tokens if samples.thinking is None else samples.thinking
        columns = (samples.split(column) for column in (samples.answer, samples.correct, lengths))
        voted = [
            _short(answers, right, tokens, most)
            for answers, right, tokens in zip(*columns, strict=True)
        ]
        return over_problems(np.array(voted))

    return Measure(f"short@{most}", "%", "high", terms, rate=True, about=short.__doc__ or "")


def _short(answers: IntArray, correct: BoolArray, lengths: IntArray, most: int) -> float:
    first = np.argsort(lengths, kind="stable")[:most]
    votes = Counter(int(answers[index]) for index in first if answers[index] != NO_ANSWER)
    winners = [
        index for index in first if votes and votes[int(answers[index])] == max(votes.values())
    ]
    return float(correct[winners[0]]) if winners else 0.0


def pass_at(k: int) -> Measure:
    """Chance that one of k draws without replacement is right: 1 - C(n - c, k) / C(n, k), unbiased
    (arXiv 2107.03374).

    A problem with fewer than k samples has none.
    """

    def terms(samples: Samples) -> FloatArray | None:
        counted = zip(
            samples.sizes.tolist(), samples.total(samples.correct).astype(int).tolist(), strict=True
        )
        values = [statistics.pass_at_k(n, c, k) if n >= k > 0 else np.nan for n, c in counted]
        return over_problems(np.array(values)) if np.isfinite(values).any() else None

    return Measure(f"pass@{k}", "%", "high", terms, rate=True, about=pass_at.__doc__ or "")


# -- budgets
# --------------------------------------------------------------------------------------------------


def accuracy_within(budget: int) -> Measure:
    """Accuracy if generation is cut off after so many tokens: a response counts if it is right and
    no longer.

    The paper's baseline (arXiv 2502.04463). One evaluation gives every budget up to its limit.
    """

    def terms(samples: Samples) -> FloatArray | None:
        if not 0 < budget <= samples.limit:
            return None
        return over_problems(samples.mean(samples.correct & (samples.tokens <= budget)))

    return Measure(
        f"accuracy_within@{budget}",
        "%",
        "high",
        terms,
        rate=True,
        about=accuracy_within.__doc__ or "",
    )


@register("%", "high", rate=True, fractional=True)
def accuracy_area(samples: Samples) -> FloatArray:
    """Area under accuracy at hard budgets, over that of a model that is right at once: the mean
    over budgets t of (0, limit] of accuracy_within@t, which is the mean of c (1 - tokens / limit).
    Of OptimalThinkingBench's AUC_OAA (arXiv 2508.13141), with all tokens in the place of the
    thinking ones, and the evaluation's limit as t_max.
    """
    return over_problems(
        samples.mean(samples.correct * np.maximum(0.0, 1 - samples.tokens / samples.limit))
    )


def early(budget: int) -> Measure:
    """Accuracy of answers that were forced after so many tokens of thought, or of the response if
    it thought less (arXiv 2505.13438). It takes an evaluation with the script `forks` that has this
    length.
    """

    def terms(samples: Samples) -> FloatArray | None:
        if samples.early is None or budget not in samples.budgets:
            return None
        return over_problems(samples.mean(samples.early[:, samples.budgets.index(budget)]))

    return Measure(
        f"early@{budget}", "%", "high", terms, rate=True, about=early.__doc__ or "", fractional=True
    )


@register("%", "high", rate=True)
def subthought_mode(samples: Samples) -> FloatArray | None:
    """Share of responses whose subthoughts' most frequent answer is right, the earliest of equals
    (arXiv 2504.20708).

    It takes the script `subthoughts`. A response without one counts by its own answer.
    """
    if samples.later is None:
        return None
    shares = [
        _mode(own) if own else float(right)
        for own, right in zip(samples.later, samples.correct, strict=True)
    ]
    return over_problems(samples.mean(np.array(shares)))


def _mode(answers: tuple[tuple[int, bool], ...]) -> float:
    votes = Counter(code for code, _ in answers if code != NO_ANSWER)
    if not votes:
        return 0.0
    # the first of equals, in the order in which they were given
    chosen = max(votes, key=lambda code: votes[code])
    return float(next(right for code, right in answers if code == chosen))


@register("%", "high", rate=True, fractional=True)
def anytime(samples: Samples) -> FloatArray | None:
    """Mean over the budgets b of the script `forks` of early@b: AnytimeReasoner's score with a
    uniform prior (arXiv 2505.13438).
    """
    return (
        None if samples.early is None else over_problems(samples.mean(samples.early.mean(axis=1)))
    )


NUMBERED.update(
    {"pass": pass_at, "accuracy_within": accuracy_within, "early": early, "short": short}
)
