"""Problems that a model forgot, and those that it learnt: right before and wrong after, and the
reverse.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from megatron_efr.evaluation.figures import Figure
from megatron_efr.evaluation.samples import Samples
from megatron_efr.evaluation.statistics import interval, mcnemar, rate_interval
from megatron_efr.types import BoolArray, FloatArray


class Turned(NamedTuple):
    """Shares of all problems, with 95% intervals.

    `forgotten`: right before and wrong after; `learnt`: the reverse; both with Wilson's interval.
    `net`: learnt less forgotten, the difference of the shares that are right, with an interval by
    bootstrap over problems. A problem is right if more than half of its responses are. `p`: the
    chance of a net as large if the models were the same, by McNemar's exact test.
    """

    problems: int
    forgotten: Figure
    learnt: Figure
    net: Figure
    p: float


def turned(before: Samples, after: Samples, seed: int = 0) -> Turned:
    """Count what turned from `before` to `after`, which have the same problems."""
    was, is_now = (_right(samples) for samples in (before, after))
    lost, won = ((a & ~b).astype(np.float64) for a, b in ((was, is_now), (is_now, was)))
    net = won - lost
    return Turned(
        len(was),
        _rate(lost),
        _rate(won),
        Figure(float(net.mean()), *interval(net, seed)),
        mcnemar(int(lost.sum()), int(won.sum())),
    )


def _rate(turned: FloatArray) -> Figure:
    """The share of problems that turned, from 0 or 1 for each, [problems]."""
    return Figure(float(turned.mean()), *rate_interval(turned, len(turned)))


def _right(samples: Samples) -> BoolArray:
    """Problems of which more than half of the responses are right, bool [problems]."""
    return samples.mean(samples.correct) > 0.5
