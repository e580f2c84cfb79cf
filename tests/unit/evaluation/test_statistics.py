"""The measures, each against a reference that computes it another way."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from megatron_efr.evaluation import statistics as measure

pytestmark = pytest.mark.alike


@given(
    st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))
)
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_answer(case):
    n, c, k = case
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert measure.pass_at_k(n, c, k) == pytest.approx(
        sum(map(any, subsets)) / len(subsets), abs=1e-12
    )


@pytest.mark.parametrize("case", [(4, 5, 1), (4, 1, 5), (4, 1, 0), (4, -1, 1)])
def test_pass_at_k_refuses_what_cannot_be(case):
    with pytest.raises(ValueError, match="needs 0 <= right"):
        measure.pass_at_k(*case)


def test_the_interval_agrees_with_scipys_bootstrap():
    values = np.random.default_rng(0).beta(2, 1, size=300)
    low, high = measure.interval(values, seed=1, resamples=20_000)
    result = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    )
    assert (low, high) == pytest.approx(tuple(result.confidence_interval), abs=1e-3)


def test_the_interval_is_seeded_and_does_not_depend_on_how_the_draws_are_chunked(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    whole = measure.bootstrap_means(values, seed=3)
    monkeypatch.setattr(measure, "_CHUNK", 1000)
    assert measure.bootstrap_means(values, seed=3).tolist() == whole.tolist()
    assert len(whole) == 2000
    assert measure.bootstrap_means(values, seed=4).tolist() != whole.tolist()
    assert measure.interval(np.array([0.25])) == (0.25, 0.25)
    with pytest.raises(ValueError, match="at least one problem"):
        measure.interval(np.array([]))


def test_clustering_widens_the_interval_as_samples_of_one_problem_agree():
    rng = np.random.default_rng(0)
    easy = rng.random(100) < 0.5
    low, high = measure.interval(easy.astype(float))  # every problem all right or all wrong
    rate = easy.mean()
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(rate * (1 - rate) / 100), rel=0.1)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        rates = rng.binomial(4, rng.beta(2, 2, size=150)) / 4
        low, high = measure.interval(rates, seed=trial, resamples=500)
        covered += low <= 0.5 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_the_interval_of_a_rate_is_wilsons_where_each_problem_has_one_response():
    for right, problems in [(0, 30), (30, 30), (1, 30), (17, 30), (700, 1000), (1, 1)]:
        rates = np.array([1.0] * right + [0.0] * (problems - right))
        reference = scipy.stats.binomtest(right, problems).proportion_ci(method="wilson")
        assert measure.rate_interval(rates, problems) == pytest.approx(
            (reference.low, reference.high), abs=1e-12
        )
    # problems count, not 300
    assert measure.rate_interval(np.zeros(30), 300) == pytest.approx((0.0, 0.1135), abs=1e-4)
    assert measure.rate_interval(np.ones(30), 300) == pytest.approx((0.8865, 1.0), abs=1e-4)
    with pytest.raises(ValueError, match="at least one problem"):
        measure.rate_interval(np.array([]), 0)


def test_the_interval_of_a_rate_is_the_bootstraps_far_from_the_ends():
    rates = np.random.default_rng(0).binomial(4, np.random.default_rng(1).beta(2, 1, size=1000)) / 4
    bootstrap = measure.interval(rates, resamples=20_000)
    assert measure.rate_interval(rates, 4000) == pytest.approx(bootstrap, abs=1.5e-3)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.3, 0.97])
def test_the_interval_of_a_rate_covers_the_truth_near_its_ends_too(rate):
    rng = np.random.default_rng(3)
    spread = rng.beta(4 * rate, 4 * (1 - rate), size=(2000, 30))  # problems of their own difficulty
    drawn = rng.binomial(4, spread) / 4
    covered = np.mean(
        [low <= rate <= high for low, high in (measure.rate_interval(row, 120) for row in drawn)]
    )
    assert covered >= 0.93


def test_the_majority_wins_and_ties_are_drawn():
    assert measure.majority(["5", "5", "7"], [True, True, False]) == 1.0
    assert measure.majority(["7", "5", "7"], [False, True, False]) == 0.0
    assert measure.majority(["5", "7"], [True, False]) == 0.5
    assert measure.majority([None, None, "5"], [False, False, True]) == 1.0  # no answer has no vote
    assert measure.majority([None], [False]) == 0.0
    with pytest.raises(ValueError, match="2 answers to 1"):
        measure.majority(["1", "2"], [True])


def test_the_shortest_majority_weighs_votes_by_their_length():
    answers, right = ["5", "5", "7"], [True, True, False]
    weights = {"5": 2 / math.log(1000), "7": 1 / math.log(10)}
    assert weights["7"] > weights["5"]  # by hand: 0.290 and 0.434
    assert measure.shortest_majority(answers, right, [1000, 1000, 10]) == 0.0
    assert measure.shortest_majority(answers, right, [1000, 900, 500]) == 1.0
    assert measure.shortest_majority(["5", "7"], [True, False], [30, 30]) == 0.5
    assert measure.shortest_majority(["5", None], [True, False], [1, 1]) == 1.0
    assert measure.shortest_majority([None], [False], [9]) == 0.0


def test_difficulties_have_their_own_order():
    assert measure.in_order(["10", "2"]) == ["2", "10"]
    assert measure.in_order(["Level 10", "Level 2"]) == ["Level 2", "Level 10"]
    assert measure.in_order(["L10", "L-2", "L9"]) == ["L-2", "L9", "L10"]
    assert measure.in_order(["0.5", "-1", "1e-05", "-0.5"]) == ["-1", "-0.5", "1e-05", "0.5"]
    assert measure.in_order(["hard", "easy"]) == ["easy", "hard"]
    assert measure.in_order(["nan", "10", "9"]) == ["10", "9", "nan"]


def test_normalised_figures_are_the_papers():
    # Arora & Zanette 2025, 7B, alpha 0.1, its table of results: 67.5% of the tokens, 96.6% of the
    # accuracy
    start = {
        "GSM8K": {"accuracy": 92.6, "tokens": 1626},
        "MATH500": {"accuracy": 93.3, "tokens": 4046},
        "AIME24": {"accuracy": 55.7, "tokens": 13174},
    }
    brief = {
        "GSM8K": {"accuracy": 91.7, "tokens": 813},
        "MATH500": {"accuracy": 92.1, "tokens": 2826},
        "AIME24": {"accuracy": 51.3, "tokens": 10898},
    }
    got = measure.normalised(brief, start)
    assert got["tokens"] == pytest.approx(0.675, abs=0.005)
    assert got["accuracy"] == pytest.approx(0.966, abs=0.005)
    assert measure.normalised(start, start) == {"accuracy": 1.0, "tokens": 1.0}
    with pytest.raises(ValueError, match="same datasets"):
        measure.normalised({}, start)
    with pytest.raises(ValueError, match="GSM8K: the starting model's accuracy is 0"):
        measure.normalised(brief, start | {"GSM8K": {"accuracy": 0.0, "tokens": 1}})


def test_aes_rewards_brevity_and_punishes_lost_accuracy_more_than_it_rewards_gained():
    aes = measure.accuracy_efficiency_score
    assert aes(0.5, 100, 0.5, 100) == 0
    assert aes(0.55, 60, 0.5, 100) == pytest.approx(0.4 + 3 * 0.1)
    assert aes(0.45, 60, 0.5, 100) == pytest.approx(0.4 - 5 * 0.1)
    assert math.isnan(aes(0.5, 10, 0.0, 10))
    assert math.isnan(aes(0.5, 10, 0.5, 0))
    assert aes(np.array([0.55, 0.45]), 60, 0.5, np.array([100, 60])) == pytest.approx([0.7, -0.5])


def test_the_ratio_of_tokens_and_its_interval_against_a_loop():
    rng = np.random.default_rng(7)
    base = rng.uniform(50, 100, size=(2, 80))
    easy = np.column_stack([base[0] * rng.uniform(0.3, 0.5, 80), base[0]])
    hard = np.column_stack([base[1] * rng.uniform(0.6, 0.8, 80), base[1]])
    on_easy, on_hard, (low, high) = measure.ratio_of_tokens(easy, hard)
    assert on_easy == pytest.approx(sum(m for m, _ in easy) / sum(b for _, b in easy))
    assert on_hard == pytest.approx(sum(m for m, _ in hard) / sum(b for _, b in hard))
    differences = []
    for _ in range(4000):
        a, b = (
            part[[int(i) for i in rng.integers(0, 80, 80)]].sum(axis=0) for part in (easy, hard)
        )
        differences.append(a[0] / a[1] - b[0] / b[1])
    assert (low, high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])), abs=2e-3)
