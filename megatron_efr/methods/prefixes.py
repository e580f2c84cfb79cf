"""Open in part, by prefixes: the beginning of a response is judged by answers that are drawn from
there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from megatron_efr.config import RolloutConfig
from megatron_efr.methods.base import Ask, Known, Visit
from megatron_efr.methods.branching import Branching, thought, tried_answers
from megatron_efr.methods.judges import judge_of, scores
from megatron_efr.methods.plain import Outcomes
from megatron_efr.scripts import Exits
from megatron_efr.types import Credit, FloatArray, Graded, Prompt, Response, Rewarded


class Prefixes(Branching):
    """A method that has each thought left after equal shares of it, and answered there."""

    exits: PositiveInt = Field(
        default=4, description="places at which a thought is left, at equal shares of it"
    )
    answers: PositiveInt = Field(default=2, description="answers at each")
    stop: str = Field(
        default="\n</think>\n\n**Final Answer**\n",
        min_length=1,
        description="what opens an answer there",
    )

    def ask(self, visit: Visit, known: Known) -> Ask:
        shares = tuple(number / (self.exits + 1) for number in range(1, self.exits + 1))
        script = Exits(
            shares=shares,
            samples=self.answers,
            tokens=self.answer_tokens,
            opening=self.stop,
            end=self.end,
        )
        return Ask(scripts=(script,) * visit.samples)

    def solved(self, group: Graded) -> list[FloatArray]:
        """Share of right answers at each of a response's exits, float64 [exits] each."""
        return [
            right.reshape(-1, self.answers).mean(-1) if len(right) else np.zeros(0)
            for right in tried_answers(group)
        ]


class SGPO(Prefixes):
    """SGPO (once Spectral PO): if all responses to a prompt are wrong, those that went wrong later
    earn more.

        r = c if any response of the group is right, else 1 / (1 + exp(-slope (x - middle)))
        x = the largest share of the thought from which an answer is still right; 0 if there is none
        with a judge: x = the share of the thought's steps before the first that it scores below
            `sound`

    A truncated response counts as wrong. Nothing is remembered.

    Open: the logistic's constants, and how the first wrong step is found: the source has a judge
    read the reference solution. Chosen: 10 and 0.5, and the verifier alone, which reads `answers`
    of the policy's own at each exit. They are drawn of every response, since nobody knows before
    whether one will be right, and not trained on.

    A `judge` takes their place: a function of a prompt, with its `gold`, and the list of a
    thought's steps, which returns a number from 0 to 1 for each step. What it returns is in the
    rewards that are kept with the rollouts; after a kill, groups that no iteration had used are
    judged again.

    It is called in the run's first process, in the grading thread, once for each response of a
    group that is all wrong, one response at a time. One that asks a server has to try again by
    itself.
    """

    source = "arXiv 2505.11595 v4, second-hand"

    slope: float = Field(default=10.0, gt=0, description="slope of the logistic; the source's beta")
    middle: float = Field(
        default=0.5, ge=0, le=1, description="share of the thought that is worth 0.5; its gamma"
    )
    judge: str | None = Field(
        default=None,
        min_length=1,
        description=(
            "scores the steps of a thought: module:function, or a name registered under "
            "megatron_efr.judges; answers at exits are verified when left out"
        ),
    )
    step: str = Field(
        default="\n\n", min_length=1, description="what stands between two steps, for a judge"
    )
    sound: float = Field(
        default=0.5, gt=0, le=1, description="the least score of a right step, for a judge"
    )

    @model_validator(mode="after")
    def _options_speak(self) -> SGPO:
        if self.judge is None:
            self.refuse_idle("method", ("step", "sound"), "without method.judge")
        else:
            early = ("exits", "answers", "answer_tokens", "stop")
            self.refuse_idle("method", early, "with method.judge: nothing is answered early")
        return self

    @property
    def sought(self) -> Mapping[str, str]:
        return {} if self.judge is None else {"end": self.end}

    def check(self, rollout: RolloutConfig) -> None:
        if self.judge is not None:
            judge_of(self.judge)

    def ask(self, visit: Visit, known: Known) -> Ask:
        return super().ask(visit, known) if self.judge is None else Ask()

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        right = Outcomes.of(group, known.limit).right
        if right.any():
            return right.astype(np.float64)
        if self.judge is not None:
            prompt = group.group.prompt
            reached = np.array(
                [self._sound(self.judge, prompt, response) for response in group.group.responses]
            )
        else:
            pairs = zip(group.group.responses, self.solved(group), strict=True)
            reached = np.array([self._reached(response, solved) for response, solved in pairs])
        return 1.0 / (1.0 + np.exp(-self.slope * (reached - self.middle)))

    def _sound(self, judge: str, prompt: Prompt, response: Response) -> float:
        """The share of the thought's steps before the first wrong one."""
        steps = [
            step for step in response.text.partition(self.end)[0].split(self.step) if step.strip()
        ]
        wrong = [score < self.sound for score in scores(judge, prompt, steps)] if steps else []
        return (wrong.index(True) if True in wrong else len(wrong)) / max(len(wrong), 1)

    def _reached(self, response: Response, solved: FloatArray) -> float:
        held = [
            branch.at for branch, share in zip(response.branches, solved, strict=True) if share > 0
        ]
        return max(held, default=0) / max(thought(response), 1)


class L2T(Prefixes):
    """L2T: each stretch of a thought earns what it adds to the chance of a right answer under the
    policy itself.

        A = c - mean c of the group;  of the tokens between exits k - 1 and k besides: alpha (p_k -
            p_(k-1))
        p_k = share of right ones among `answers` at exit k

    The stretch before the first exit and what follows the last one have no such part. A wrong or
    truncated response has c = 0. Nothing is remembered. Answers at exits are not trained on. Open:
    the paper takes the gain in information from the policy's own parameters, and its released code
    another model's scores of each step. Chosen: the policy's chance to be right, as counted;
    stretches of equal length; alpha 0.5; no price on parameters.
    """

    source = "arXiv 2505.10425, with ML-TASA/L2T@f9bce04 l2t.py, which has another method"

    alpha: float = Field(default=0.5, ge=0, description="weight of what a stretch adds")

    def credits(self, groups: Sequence[Rewarded], known: Known) -> Sequence[Credit]:
        return [self._credit(group) for group in groups]

    def _credit(self, group: Rewarded) -> Credit:
        pairs = zip(group.group.responses, self.solved(group.graded), strict=True)
        added = tuple(self._added(response, solved) for response, solved in pairs)
        return Credit(group.rewards - group.rewards.mean(), per_token=added)

    def _added(self, response: Response, solved: FloatArray) -> FloatArray:
        """Credit that each token of a response has besides, [tokens]."""
        made = np.zeros(len(response.tokens))
        places = [branch.at for branch in response.branches]
        for start, end, gained in zip(places, places[1:], np.diff(solved), strict=False):
            made[start:end] = self.alpha * gained
        return made
