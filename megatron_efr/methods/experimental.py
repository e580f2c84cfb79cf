"""Open in part: methods whose sources leave something out. Each says what is open, and what is chosen here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from megatron_efr.methods.base import Ask, Known, Method, State, Visit
from megatron_efr.methods.efr import efr_rewards
from megatron_efr.methods.plain import Outcomes, Plain, tells
from megatron_efr.methods.samplings import Monitor, Samplings
from megatron_efr.types import FloatArray, Graded, Rewarded

LEVELS = ("low", "medium", "high")


class ALP(Plain):
    """ALP: a price on tokens that grows with how often the prompt is solved.

        r = c - beta l max(p, 1 / n),  p = share of right responses of the group

    Wrong and truncated responses pay alike. Nothing is remembered. Open: whether lengths are divided by a normaliser;
    readers of the paper differ. Chosen: none, with the beta of 1e-7 per token that they agree on, which is little next
    to a reward of 1 unless the algorithm divides by the group's spread.
    """

    source = "Xiang et al. 2025, arXiv 2506.05256, second-hand"
    wrong_may_win = "a right answer is 1 / (beta max(p, 1 / n)) tokens longer than a wrong one: 10,000,000 by default"

    beta: float = Field(default=1e-7, ge=0, description="price of a token of a prompt that is always solved")

    def rule(self, group: Outcomes) -> FloatArray:
        solved = max(group.accuracy, 1.0 / len(group.right))
        return group.right - self.beta * group.lengths * solved


class GR3(Plain):
    """GR3: the reward divided by a response's length in means of its group.

        r = c / (1 + alpha l / mean l)

    A wrong or truncated response earns 0, and its length is in the mean. Nothing is remembered. Open: the authors'
    code. Chosen: the equations as another paper restates them, and its alpha for verified rewards.
    """

    source = "arXiv 2603.10535, as restated in QGLAS, appendix A.2"

    alpha: float = Field(default=0.33, ge=0, description="larger is briefer")

    def rule(self, group: Outcomes) -> FloatArray:
        return np.where(group.right, 1.0 / (1.0 + self.alpha * group.lengths / group.lengths.mean()), 0.0)


class Target(Method):
    """A target accuracy: as brief as the accuracy on held-out problems allows, without a choice of alpha.

        r = efr's, with the alpha of the moment
        alpha = min(alpha + up, most) after a sampling with accuracy >= that of the start - tolerance,
                max(alpha - down, 0) after any other

    `prompts` problems of evaluation.datasets are sampled before the first iteration, which is the start, and after
    every `every`. The accuracy of 100 problems x 4 responses is known to about 2 points, and such is `tolerance`. A
    wrong or truncated response earns 0. alpha, the accuracy of the start and the last sampling are remembered; alpha is
    in the metrics (`method/alpha`), beside `monitor/accuracy`. Open: it is this project's own, and how it compares with
    the best of fixed alphas is not known. Chosen: a step of 0.05 up, and one of twice that down.
    """

    source = "this project; its reward is Arora & Zanette 2025, arXiv 2502.04463, eq. 4 and 5"

    alpha: float = Field(default=0.0, ge=0, lt=1, description="alpha at first")
    most: float = Field(default=0.9, ge=0, lt=1, description="the largest alpha")
    up: float = Field(default=0.05, gt=0, lt=1, description="what alpha rises while accuracy holds")
    down: float = Field(default=0.1, gt=0, lt=1, description="what alpha falls if it does not")
    tolerance: float = Field(default=0.02, ge=0, le=1, description="accuracy that may be lost against the start")
    prompts: PositiveInt = Field(default=100, description="held-out problems that are watched, at most")
    monitor_samples: PositiveInt = Field(default=4, description="responses to each of them")
    every: PositiveInt = Field(default=10, description="iterations between samplings")

    @model_validator(mode="after")
    def _begins_below_the_most(self) -> Target:
        if self.alpha > self.most:
            raise ValueError(f"alpha: {self.alpha} is above most = {self.most}")
        return self

    @property
    def samplings(self) -> Samplings:
        return Samplings(monitor=Monitor(self.prompts, self.monitor_samples, self.every, held_out=True))

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        seen = Outcomes.of(group, known.limit)
        return efr_rewards(seen.right, seen.lengths, self._followed(known.state, known)["alpha"])

    def learn(self, state: State, groups: Sequence[Rewarded], known: Known) -> State:
        return self._followed(state, known)

    def _followed(self, state: State, known: Known) -> State:
        """The state once the last sampling that is known has been looked at: at once, and once only."""
        if known.monitored is None or known.monitored <= state.get("looked", -1):
            return state or {"alpha": self.alpha}
        accuracy = float(np.mean([each.solved for each in known.monitor.values()]))
        alpha, start = state.get("alpha", self.alpha), state.get("start", accuracy)
        if "start" in state:
            held = accuracy >= start - self.tolerance
            alpha = min(alpha + self.up, self.most) if held else max(alpha - self.down, 0.0)
        return {"alpha": alpha, "start": start, "looked": known.monitored}


class Effort(Method):
    """Effort levels: one model that is told how much to think, so that the reader chooses alpha at inference.

        r = efr's, with alpha = low, medium or high, each as often, drawn for each visit of a prompt

    The question ends with `suffix`, which says the level; so must the question of a reader (`prompt.template`). A wrong
    or truncated response earns 0. Nothing is remembered: the level is a function of the run's seed and the visit. Open:
    how it compares with a model for each alpha; it is this project's own. Chosen: the paper's range of alpha, low
    effort being its largest.
    """

    source = "this project; its reward is Arora & Zanette 2025, arXiv 2502.04463, eq. 4 and 5"

    low: float = Field(default=0.4, ge=0, lt=1, description="alpha of low effort: the briefest")
    medium: float = Field(default=0.1, ge=0, lt=1, description="alpha of medium effort")
    high: float = Field(default=0.0, ge=0, lt=1, description="alpha of high effort")
    suffix: Annotated[str, tells("level")] = Field(
        default=" Effort: {level}.", description="what is added to the question"
    )

    def ask(self, visit: Visit, known: Known) -> Ask:
        return self._asked(LEVELS[int(np.random.default_rng(visit.seed).integers(len(LEVELS)))])

    def longest_asks(self, visit: Visit, known: Known) -> Sequence[Ask]:
        return [self._asked(level) for level in LEVELS]

    def _asked(self, level: str) -> Ask:
        return Ask(suffix=self.suffix.replace("{level}", level), note={"level": level})

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        seen = Outcomes.of(group, known.limit)
        alpha = {"low": self.low, "medium": self.medium, "high": self.high}[group.group.note["level"]]
        return efr_rewards(seen.right, seen.lengths, alpha)
