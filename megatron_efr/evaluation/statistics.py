"""Statistics of numbers: intervals over problems, pass@k, votes, and ratios; seeded if they
draw.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000
LEVEL = 0.95
_CHUNK = 4_000_000  # draws held at once: 32 MB
_NUMBER = re.compile(r"(?:(?<![\w.])-)?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")  # no minus in `L-4`


def drawn_problems(problems: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Draws of the problems' indices with replacement, int64 [some, problems] at a time,
    `resamples` in all.
    """
    if problems == 0:
        raise ValueError("a bootstrap needs at least one problem")
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // problems)
    for start in range(0, resamples, chunk):
        yield rng.integers(0, problems, (min(chunk, resamples - start), problems))


def bootstrap_means(values: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Means of `values` [problems] over `resamples` draws of the problems with replacement, float64
    [resamples].

    Resampling problems, not responses, is what makes the interval clustered: the responses to one
    problem are not independent, and enter only through their mean.
    """
    return np.concatenate(
        [values[draws].mean(axis=1) for draws in drawn_problems(len(values), seed, resamples)]
    )


def interval(
    values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over problems; `values` [problems] holds each
    problem's mean.

    One problem alone gives an interval of no width: there is nothing to resample.
    """
    tail = (1 - level) / 2
    low, high = np.quantile(bootstrap_means(values, seed, resamples), [tail, 1 - tail])
    return float(low), float(high)


def rate_interval(rates: np.ndarray, samples: float, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval of the mean of `rates` [problems], each in [0, 1], over `samples` responses
    in all.

    Responses to one problem are not independent, so the count in Wilson's formula is the effective
    one, p (1 - p) / (variance between problems / problems), no fewer than the problems and no more
    than the responses (Korn & Graubard 1998; Dean & Pagano 2015). Responses of values between 0 and
    1 may be worth more than as many of 0 and 1: for those `samples` is infinite. At 0% and 100%,
    with no variance, it is the problems. With one response each this is Wilson's interval itself.
    """
    problems = len(rates)
    if problems == 0:
        raise ValueError("an interval needs at least one problem")
    rate = float(np.mean(rates))
    between = float(np.var(rates, ddof=1)) / problems if problems > 1 else 0.0
    spread = rate * (1 - rate)
    count = spread / between if between > 0 else problems
    count = min(max(count, problems), max(samples, problems))
    z = NormalDist().inv_cdf(0.5 + level / 2)
    middle = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(spread / count + (z / (2 * count)) ** 2)
    return max(0.0, min(middle - half, rate)), min(1.0, max(middle + half, rate))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that at least one of k draws without replacement is right: 1 - C(n-c, k)/C(n, k),
    unbiased.

    Chen et al. 2021 (2107.03374), eq. 1. ValueError unless 0 <= correct <= samples and 1 <= k <=
    samples.
    """
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(
            f"pass@{k} of {correct} right among {samples}: needs 0 <= right <= samples and 1 <= k "
            "<= samples"
        )
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(answers: Sequence[Hashable | None], correct: Sequence[bool] | np.ndarray) -> float:
    """Chance that a vote over the samples of one problem is right; a tie is drawn fairly, None (no
    answer) has no vote.

    `answers` are keys under which equal answers are equal. Nobody voting is wrong.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return _elected(votes, answers, correct)


def shortest_majority(
    answers: Sequence[Hashable | None],
    correct: Sequence[bool] | np.ndarray,
    lengths: Sequence[int] | np.ndarray,
) -> float:
    """Chance that the shortest majority vote is right: an answer has count / ln(mean length) votes.

    Zeng et al. 2025 (2502.12215). `lengths` are tokens, taken as 2 at least, so that the logarithm
    is positive; ties and None as in `majority`.
    """
    votes: dict[Hashable, float] = {}
    for answer in dict.fromkeys(answers):
        if answer is not None:
            own = [
                length for other, length in zip(answers, lengths, strict=True) if other == answer
            ]
            votes[answer] = len(own) / math.log(max(float(np.mean(own)), 2.0))
    return _elected(votes, answers, correct)


def _elected(
    votes: Mapping[Hashable, float],
    answers: Sequence[Hashable | None],
    correct: Sequence[bool] | np.ndarray,
) -> float:
    """Chance that an answer with the most votes is right, a tie drawn fairly."""
    if len(answers) != len(correct):
        raise ValueError(f"{len(answers)} answers to {len(correct)} graded responses")
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if math.isclose(count, most)]
    of_winner = [
        [right for answer, right in zip(answers, correct, strict=True) if answer == w]
        for w in winners
    ]
    return float(np.mean([np.mean(rights) for rights in of_winner]))


def in_order(levels: Iterable[str]) -> list[str]:
    """Difficulties sorted by the first number in them (`2`, `10`, `Level 3`, `L4`), by text if one
    has no number.
    """
    levels = list(levels)
    numbers = {level: _number(level) for level in levels}
    if any(number is None for number in numbers.values()):
        return sorted(levels)
    return sorted(levels, key=lambda level: (numbers[level], level))


def _number(text: str) -> float | None:
    found = _NUMBER.search(text)
    return None if found is None else float(found[0])


def normalised(
    figures: Mapping[str, Mapping[str, float]], start: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Mean over datasets of the ratio to the starting model (Arora & Zanette 2025, section 5; 1.0 =
    as the start).

    Both map dataset -> {"accuracy", "tokens"}. ValueError if the datasets differ or the start
    scores 0 on one.
    """
    if set(figures) != set(start) or not start:
        raise ValueError(
            f"normalised figures need the same datasets: {sorted(figures)} against {sorted(start)}"
        )
    for name, figure in start.items():
        for key in ("accuracy", "tokens"):
            if not figure[key] > 0:
                raise ValueError(
                    f"dataset {name}: the starting model's {key} is {figure[key]}, no ratio to it "
                    "exists"
                )
    both = {
        key: [
            np.array([of[name][key] for name in start], dtype=np.float64) for of in (figures, start)
        ]
        for key in ("accuracy", "tokens")
    }
    return {key: float(mean_ratio(own, base)) for key, (own, base) in both.items()}


def mean_ratio(own: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Mean over the last axis, that of data sets, of `own` over `base`; nan if a base is not above
    0.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(base > 0, own / base, np.nan).mean(axis=-1)


def accuracy_efficiency_score(
    accuracy: ArrayLike,
    tokens: ArrayLike,
    start_accuracy: ArrayLike,
    start_tokens: ArrayLike,
    weights: tuple[float, float, float] = (1.0, 3.0, 5.0),
) -> np.ndarray:
    """AES of O1-Pruner (2501.12570): w dL + b |dA| if accuracy rose, w dL - g |dA| if it fell.

    dL = (start_tokens - tokens) / start_tokens and dA = (accuracy - start_accuracy) /
    start_accuracy; `weights` are (w, b, g), known from others' accounts alone. 0 is the starting
    model; higher is better; nan if the start is 0 in either. Numbers, or arrays of one shape, which
    is the result's.
    """
    w, b, g = weights
    with np.errstate(invalid="ignore", divide="ignore"):
        shorter = 1 - np.divide(tokens, start_tokens)
        better = np.divide(accuracy, start_accuracy) - 1
    known = np.isfinite(shorter) & np.isfinite(better)
    return np.where(known, w * shorter + np.where(better >= 0, b, g) * better, np.nan)[()]


def ratio_of_tokens(
    easy: np.ndarray,
    hard: np.ndarray,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[float, float, tuple[float, float]]:
    """Share of the base's tokens on easy and on hard problems, and an interval of the difference.

    `easy`, `hard` are float64 [problems, 2]: mean tokens of (model, base) on each problem. Returns
    (ratio on easy, ratio on hard, interval of easy - hard): below 0, easy problems shrink
    relatively more. Problems are resampled with both models' tokens together, each part within
    itself.
    """

    def ratio(pairs: np.ndarray) -> float:
        return float(pairs[:, 0].sum() / pairs[:, 1].sum())

    def drawn(pairs: np.ndarray, stream: int) -> np.ndarray:
        # the same draws
        model, base = (bootstrap_means(pairs[:, column], stream, resamples) for column in (0, 1))
        return model / base

    tail = (1 - level) / 2
    low, high = np.quantile(drawn(easy, 2 * seed) - drawn(hard, 2 * seed + 1), [tail, 1 - tail])
    return ratio(easy), ratio(hard), (float(low), float(high))


def mcnemar(only_one: int, only_other: int) -> float:
    """McNemar's exact two-sided p: of the problems that only one of two models gets right, a fair
    coin's.

    The binomial test of `only_one` among both together; 1 without any.
    """
    count = only_one + only_other
    tail = sum(math.comb(count, k) for k in range(min(only_one, only_other) + 1))
    return min(1.0, 2 * tail / 2**count)
