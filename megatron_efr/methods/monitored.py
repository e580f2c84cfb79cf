"""Targets by difficulty: how long an answer may be follows what the present weights answer to a
monitor set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field, PositiveInt

from megatron_efr.config import ConfigError, RolloutConfig
from megatron_efr.methods.base import Known, Method
from megatron_efr.methods.plain import Outcomes
from megatron_efr.methods.samplings import ByPrompt, Monitor, Samplings
from megatron_efr.types import FloatArray, Graded, IntArray

Band = Literal["high", "medium", "low"]

LONG = (30, 100)
"""Tokens of a response below which two in a row count as said again, and three; else four."""

SHORT = 200
"""Tokens of a response below which to say it twice is repetitive; else three times."""


class LaserD(Method):
    """LASER-D: a bonus for right answers within a target length, which depends on how hard the
    prompt is.

        r = 1 + bonus [l <= target(band)] if right, wrong if wrong, unanswered without an answer
        band = high if p >= 2/3, medium if p >= 1/3, else low;
            p = share of right responses of the group
        target(band) = the least L of lowest, lowest + step, ... with floor(q cov(L)) >= 1,
            q = 5, 2, 1 of high,
                       medium, low;  cov(L) = share of the band's right responses in the monitor
                           set with l <= L

    The monitor set is sampled before the first iteration and after every `every`. A band that has
    no response there, or none short enough, has no target: each right answer of it gets the bonus,
    as in the released code, which takes the longest response at hand. A truncated response has no
    answer, and no wrong one a bonus. Nothing is remembered but the monitor set's responses, which
    the run keeps.

    The released code takes the share of all the band's responses (`coverage: all`), so that the
    target of low is the longest of them, and cuts bands at <= 1/3 and <= 2/3 when it looks at the
    monitor set: no difference for eight responses.
    """

    source = (
        "Liu et al. 2025, arXiv 2505.15612; hkust-nlp/Laser@c9e7c4e count_length_distribution.py, "
        "ray_trainer.py"
    )
    standing = "code"

    bonus: float = Field(default=0.5, ge=0, description="bonus of a right answer within the target")
    wrong: float = Field(default=-0.5, lt=1, description="reward of a wrong answer")
    unanswered: float = Field(
        default=-1.0, lt=1, description="reward of a response without an answer"
    )
    coverage: Literal["right", "all"] = Field(
        default="right", description="responses of which a share must fit"
    )
    lowest: PositiveInt = Field(default=1024, description="the least target in tokens")
    step: PositiveInt = Field(default=1024, description="tokens between targets")
    monitored: PositiveInt = Field(default=500, description="prompts of the monitor set, at most")
    monitor_samples: PositiveInt = Field(default=8, description="responses to each of them")
    every: PositiveInt = Field(
        default=20, description="iterations between samplings of the monitor set"
    )

    @property
    def samplings(self) -> Samplings:
        return Samplings(monitor=Monitor(self.monitored, self.monitor_samples, self.every))

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        seen = Outcomes.of(group, known.limit)
        target = self.targets(known.monitor, known.limit)[band(seen.accuracy)]
        within = seen.lengths <= (math.inf if target is None else target)
        wrong = np.where(seen.answered, self.wrong, self.unanswered)
        return np.where(
            seen.right, 1.0 + self.bonus * within, wrong + self._explored(group, seen, target)
        )

    def targets(self, monitor: ByPrompt, limit: int) -> dict[Band, int | None]:
        """The target in tokens of each band, from the monitor set; None: it has none."""
        lengths: dict[Band, list[int]] = {"high": [], "medium": [], "low": []}
        for each in monitor.values():
            kept = each.right if self.coverage == "right" else (True,) * len(each.right)
            lengths[band(each.solved)] += [
                length for length, keep in zip(each.lengths, kept, strict=True) if keep
            ]
        wanted: tuple[tuple[Band, int], ...] = (("high", 5), ("medium", 2), ("low", 1))
        return {name: self._target(lengths[name], share, limit) for name, share in wanted}

    def check(self, rollout: RolloutConfig) -> None:
        if self.lowest >= rollout.max_new_tokens:
            raise ConfigError(
                f"method.lowest: {self.lowest} tokens, and no response has more than "
                f"rollout.max_new_tokens = {rollout.max_new_tokens}: each right answer would get "
                "the bonus; set it to less than that"
            )

    def _target(self, lengths: Sequence[int], share: int, limit: int) -> int | None:
        ordered = np.sort(np.asarray(lengths))
        for target in range(self.lowest, limit + self.step, self.step):
            within = int(np.searchsorted(ordered, target, side="right"))
            if len(ordered) and within * share >= len(ordered):
                return target
        return None

    def _explored(self, group: Graded, seen: Outcomes, target: int | None) -> FloatArray:
        """Reward of a wrong answer beside correctness, [n]."""
        return np.zeros(len(seen.lengths))


class LaserDE(LaserD):
    """LASER-DE: LASER-D, and wrong answers beyond the target lose less, so that hard problems are
    explored.

        r = that of laser_d + bonus if wrong, l > target(band), and not repetitive

    A truncated response that is not repetitive gets the bonus too, and so does any without an
    answer; in the released code none of these does. Repetitive is a response that says the same
    four tokens in a row three times, two of them within a third of its length, or the same eight
    twice. In fewer than 200 tokens twice is enough, and below 100 tokens three in a row count (six
    twice), below 30 two (four twice). Nothing is remembered but the monitor set's responses.
    """

    source = (
        "Liu et al. 2025, arXiv 2505.15612; hkust-nlp/Laser@c9e7c4e length_penalty.py, "
        "compute_unique_tokens.py"
    )
    wrong_may_win_if = "`wrong` or `unanswered` is above 1 - `bonus`"

    def _explored(self, group: Graded, seen: Outcomes, target: int | None) -> FloatArray:
        if target is None:
            return np.zeros(len(seen.lengths))
        made = np.zeros(len(seen.lengths))
        for i in np.flatnonzero(~seen.right & (seen.lengths > target)):
            if not repetitive(group.group.responses[i].tokens):
                made[i] = self.bonus
        return made


def band(solved: float) -> Band:
    """Difficulty of prompts by their share of right responses: the thirds, to rounding."""
    return "high" if solved >= 2 / 3 - 1e-9 else "medium" if solved >= 1 / 3 - 1e-9 else "low"


def repetitive(tokens: Sequence[int]) -> bool:
    """True if the same tokens in a row come again and again; see LaserDE."""
    count = len(tokens)
    size = 2 if count < LONG[0] else 3 if count < LONG[1] else 4
    if count <= 2 * size:
        return False
    runs = single = np.unique(np.asarray(tokens), return_inverse=True)[1]
    alike = np.ones(count - size + 1, dtype=bool)  # one token over and over, which is no phrase
    for length in range(1, size):
        runs = _joined(runs, single[length:])
        alike &= single[: len(alike)] == single[length : length + len(alike)]
    times = 2 if count < SHORT else 3
    if _comes_again(
        runs if size == 2 else np.where(alike, -1 - np.arange(len(runs)), runs), times, count // 3
    ):
        return True
    return count >= 4 * size and len(np.unique(_joined(runs, runs[size:]))) < count - 2 * size + 1


def _joined(runs: IntArray, following: IntArray) -> IntArray:
    """Numbers of the runs that go on with what follows them, the same for the same runs."""
    pairs = runs[: len(following)] * (int(following.max()) + 1) + following
    return np.unique(pairs, return_inverse=True)[1]


def _comes_again(runs: IntArray, times: int, near: int) -> bool:
    """True if one number stands there so often, two of them less than `near` apart."""
    order = np.argsort(runs, kind="stable")
    same = np.diff(runs[order]) == 0
    gaps = np.diff(order)
    _, kinds, counts = np.unique(runs, return_inverse=True, return_counts=True)
    return bool(np.any(same & (gaps < near) & (counts[kinds[order[1:]]] >= times)))
