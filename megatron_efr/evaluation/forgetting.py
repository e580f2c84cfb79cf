"""Problems that a model forgot, and those that it learnt: right before and wrong after, and the
reverse.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from megatron_efr.evaluation.figures import Figure, resampled, spread, summed
from megatron_efr.evaluation.samples import Samples
from megatron_efr.evaluation.statistics import mcnemar
from megatron_efr.types import BoolArray


class Turned(NamedTuple):
    """Shares of all problems, with 95% intervals by bootstrap over problems, both models' answers
    to one together.

    `forgotten`: right before and wrong after; `learnt`: the reverse; `net`: learnt less forgotten,
    the difference of the shares that are right. A problem is right if more than half of its
    responses are. `p`: the chance of a net as large if the models were the same, by McNemar's exact
    test.
    """

    problems: int
    forgotten: Figure
    learnt: Figure
    net: Figure
    p: float


def turned(before: Samples, after: Samples, seed: int = 0) -> Turned:
    """Count what turned from `before` to `after`, which have the same problems."""
    was, is_now = (_right(samples) for samples in (before, after))
    forgotten, learnt = was & ~is_now, is_now & ~was
    terms = np.stack([forgotten, learnt, np.ones(len(was))], axis=1).astype(np.float64)
    found, drawn = summed(terms), resampled(terms, seed)
    shares, by_chance = found[:2] / found[2], drawn[:, :2] / drawn[:, 2:]
    lost, won = (Figure(float(shares[i]), *spread(by_chance[:, i])) for i in (0, 1))
    net = Figure(float(shares[1] - shares[0]), *spread(by_chance[:, 1] - by_chance[:, 0]))
    return Turned(len(was), lost, won, net, mcnemar(int(forgotten.sum()), int(learnt.sum())))


def _right(samples: Samples) -> BoolArray:
    """Problems of which more than half of the responses are right, bool [problems]."""
    return samples.mean(samples.correct) > 0.5
