"""Two families' figures agree if their intervals overlap."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_efr.errors import UserError
from megatron_efr.evaluation.statistics import interval
from megatron_efr.report.agreement import agreement_markdown, compare

pytestmark = pytest.mark.alike


def family(
    *models: tuple[float | None, tuple[float, float], tuple[float, float]],
) -> dict[str, Any]:
    """A summary with intervals of accuracy and tokens; each figure is its interval's middle."""
    return {
        "models": [
            {
                "name": "base" if alpha is None else f"alpha-{alpha}",
                "alpha": alpha,
                "accuracy": sum(accuracy) / 2,
                "accuracy_ci": list(accuracy),
                "tokens": sum(tokens) / 2,
                "tokens_ci": list(tokens),
            }
            for alpha, accuracy, tokens in models
        ]
    }


ONE = family((None, (0.70, 0.74), (60, 62)), (0.4, (0.90, 0.92), (30, 31)))


def test_figures_agree_exactly_where_intervals_touch() -> None:
    other = family((None, (0.74, 0.78), (62.1, 64)), (0.4, (0.80, 0.99), (29, 29.9)))
    assert [found.agree for found in compare(ONE, other)] == [True, False, True, False]
    assert [found.agree for found in compare(other, ONE)] == [True, False, True, False]
    table = agreement_markdown(compare(ONE, other), "embedded", "served").splitlines()
    assert table[0] == "| model | figure | embedded | served | |"
    assert table[2] == "| base | accuracy | 72.0% [70.0, 74.0] | 76.0% [74.0, 78.0] | agree |"
    assert table[5] == "| alpha 0.4 | tokens | 30.5 [30.0, 31.0] | 29.4 [29.0, 29.9] | APART |"
    assert table[-1].endswith("2 of 4 figures agree: theirs overlap.")


def test_other_families_are_not_compared() -> None:
    with pytest.raises(UserError, match=r"base, alpha 0\.4; and base"):
        compare(ONE, family((None, (0.7, 0.8), (60, 61))))
    over_seeds = family((None, (0.7, 0.8), (60, 61)))
    del over_seeds["models"][0]["tokens_ci"]
    with pytest.raises(UserError, match="several seeds"):
        compare(over_seeds, over_seeds)
    over_seeds["models"][0]["tokens_ci"] = None
    with pytest.raises(UserError, match="several seeds"):
        compare(over_seeds, over_seeds)


def test_equal_families_are_found_apart_as_seldom_as_it_is_said() -> None:
    """Intervals that touch are 2 x 1.96 standard errors of one mean apart, 2.77 of the difference:
    0.6%.
    """
    rng = np.random.default_rng(0)
    intervals = [interval(rng.normal(size=400), seed=i, resamples=400) for i in range(1600)]
    pairs = zip(intervals[::2], intervals[1::2], strict=True)
    apart = np.mean([low > high_2 or low_2 > high for (low, high), (low_2, high_2) in pairs])
    assert 0.0 < apart < 0.02
