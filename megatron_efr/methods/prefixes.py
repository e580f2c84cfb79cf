"""Open in part, by prefixes: the beginning of a response is judged by answers that are drawn from there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field, PositiveInt

from megatron_efr.methods.base import Ask, Known, Visit
from megatron_efr.methods.branching import Branching, thought, tried_answers
from megatron_efr.methods.plain import Outcomes
from megatron_efr.scripts import Exits
from megatron_efr.types import Credit, FloatArray, Graded, Response, Rewarded


class Prefixes(Branching):
    """A method that has each thought left after equal shares of it, and answered there."""

    exits: PositiveInt = Field(default=4, description="places at which a thought is left, at equal shares of it")
    answers: PositiveInt = Field(default=2, description="answers at each")
    stop: str = Field(
        default="\n</think>\n\n**Final Answer**\n", min_length=1, description="what opens an answer there"
    )

    def ask(self, visit: Visit, known: Known) -> Ask:
        shares = tuple(number / (self.exits + 1) for number in range(1, self.exits + 1))
        script = Exits(shares=shares, samples=self.answers, tokens=self.answer_tokens, opening=self.stop, end=self.end)
        return Ask(scripts=(script,) * visit.samples)

    def solved(self, group: Graded) -> list[FloatArray]:
        """Of each response, the share of right answers at each of its exits."""
        return [
            right.reshape(-1, self.answers).mean(-1) if len(right) else np.zeros(0) for right in tried_answers(group)
        ]


class SGPO(Prefixes):
    """SGPO (once Spectral PO): if all responses to a prompt are wrong, those that went wrong later earn more.

        r = c if any response of the group is right, else 1 / (1 + exp(-slope (x - middle)))
        x = the largest share of the thought from which an answer is still right; 0 if there is none

    A truncated response counts as wrong. Nothing is remembered. Open: the logistic's constants, and how the first wrong
    step is found: the source has a judge read the reference solution. Chosen: 10 and 0.5, and the verifier alone, which
    reads `answers` of the policy's own at each exit. They are drawn of every response, since nobody knows before
    whether one will be right, and not trained on.
    """

    source = "arXiv 2505.11595 v4, second-hand"

    slope: float = Field(default=10.0, gt=0, description="of the logistic; the source's beta")
    middle: float = Field(default=0.5, ge=0, le=1, description="share of the thought that is worth 0.5; its gamma")

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        right = Outcomes.of(group, known.limit).right
        if right.any():
            return right.astype(np.float64)
        pairs = zip(group.group.responses, self.solved(group), strict=True)
        reached = np.array([self._reached(response, solved) for response, solved in pairs])
        return 1.0 / (1.0 + np.exp(-self.slope * (reached - self.middle)))

    def _reached(self, response: Response, solved: FloatArray) -> float:
        held = [branch.at for branch, share in zip(response.branches, solved, strict=True) if share > 0]
        return max(held, default=0) / max(thought(response), 1)


class L2T(Prefixes):
    """L2T: each stretch of a thought earns what it adds to the chance of a right answer under the policy itself.

        A = c - mean c of the group;  of the tokens between exits k - 1 and k besides: alpha (p_k - p_(k-1))
        p_k = share of right ones among `answers` at exit k

    The stretch before the first exit and what follows the last one have no such part. A wrong or truncated response has
    c = 0. Nothing is remembered. Answers at exits are not trained on. Open: the paper takes the gain in information
    from the policy's own parameters, and its released code another model's scores of each step. Chosen: the policy's
    chance to be right, as counted; stretches of equal length; alpha 0.5; no price on parameters.
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
        made, places = np.zeros(len(response.tokens)), [branch.at for branch in response.branches]
        for start, end, gained in zip(places, places[1:], np.diff(solved), strict=False):
            made[start:end] = self.alpha * gained
        return made
