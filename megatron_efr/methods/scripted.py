"""Responses made by a script: the beginning of a response is given, or its thought is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from megatron_efr.config import ConfigError, RolloutConfig
from megatron_efr.methods.base import Ask, Known, Needs, State, Visit
from megatron_efr.methods.plain import Outcomes, Plain, tells
from megatron_efr.scripts import Budget, Opened
from megatron_efr.types import FloatArray, Graded, Response, Rewarded

TRIED = 16
"""Targets whose sentence LAPO has checked: numbers of as many digits may be of more or fewer
tokens.
"""


class ASRR(Plain):
    """ASRR: prompts that are solved without a thought are shortened.

        alpha = 0 if p < tau, else beta (p - tau + eps) / (1 - tau + eps),
            p = share of right responses
        r = c - alpha clip((l - lmin_C) / window, 0, 1),  lmin_C = the shortest right length

    Every response opens with `opening`, which closes the thought. Wrong and truncated responses pay
    for length too. Nothing is remembered. With tau 1, the paper's main setting, groups that are all
    right are shortened alone. The text gives no eps; 1e-6 is this project's. A chat template that
    does not open the thought needs an opening that does.
    """

    source = "Zhang et al. 2025, arXiv 2505.15400, eq. 5-7 and appendix A"
    standing = "text"

    tau: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="share of right responses from which a group is shortened",
    )
    beta: float = Field(default=0.5, ge=0, le=1, description="the largest price of length")
    window: float = Field(
        default=2048.0,
        gt=0,
        description="tokens above the shortest right answer that cost it all",
    )
    opening: str = Field(
        default="Okay, I have finished thinking.\n</think>\n\n",
        min_length=1,
        description="what every response begins with, neither counted nor trained on",
    )

    def ask(self, visit: Visit, known: Known) -> Ask:
        return Ask(scripts=(Opened(opening=self.opening),) * visit.samples)

    def rule(self, group: Outcomes) -> FloatArray:
        accuracy = group.right.astype(np.float64)
        eps = 1e-6
        if not group.right.any() or group.accuracy < self.tau:
            return accuracy
        price = self.beta * (group.accuracy - self.tau + eps) / (1.0 - self.tau + eps)
        return accuracy - price * np.clip(
            (group.lengths - group.right_lengths.min()) / self.window, 0.0, 1.0
        )


class Elastic(Plain):
    """Elastic Reasoning: a thought of at most `thought` tokens, and an answer of at most `answer`.

        r = c,  of responses whose thought is cut at its budget, closed, and answered all the same

    A wrong response earns 0, and so does a truncated one, whose answer was cut, and one that ends
    within its thought. Nothing is remembered. The verifier reads the whole response, so that a box
    in the thought counts if the answer has none; the released code reads the answer alone. The text
    that closes a thought is written, and not trained on; the released code trains on it.
    """

    source = (
        "Xu et al. 2025, arXiv 2505.05315; SalesforceAIResearch/Elastic-Reasoning@8871a3c "
        "vllm_rollout.py"
    )
    standing = "code"

    needs = Needs(samples=1)

    thought: PositiveInt = Field(default=1024, description="tokens of the thought at most")
    answer: PositiveInt = Field(default=1024, description="tokens of the answer at most")
    end: str = Field(
        default="</think>", min_length=1, description="the single token that ends a thought"
    )
    cut: str = Field(
        default="\n</think>\n\n", min_length=1, description="what closes a thought that is cut"
    )

    def ask(self, visit: Visit, known: Known) -> Ask:
        script = Budget(most=self.thought, answer=self.answer, end=self.end, cut=self.cut)
        return Ask(scripts=(script,) * visit.samples)

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        answers = np.array(
            [not _ends_in_thought(response) for response in group.group.responses], dtype=bool
        )
        return self.rule(Outcomes.of(group, known.limit)) * answers

    def rule(self, group: Outcomes) -> FloatArray:
        return group.right.astype(np.float64)

    def check(self, rollout: RolloutConfig) -> None:
        if self.thought + self.answer > rollout.max_new_tokens:
            raise ConfigError(
                f"method.thought: {self.thought} tokens and method.answer = {self.answer} are "
                f"more than rollout.max_new_tokens = {rollout.max_new_tokens}, and a thought that "
                "is cut would leave less for its answer; set max_new_tokens to "
                f"{self.thought + self.answer} or more, or one of them lower"
            )


def _ends_in_thought(response: Response) -> bool:
    return bool(response.parts) and response.parts[-1].name == "thought"


class LAPO(Plain):
    """LAPO: right answers of middle length first, then of the length that a prompt took.

        first stage:   r = c + weight R,
            R = 1 within the `low` to `high` percentiles of the right lengths (linear),
                       and falls to 0 over `slope` tokens outside; 0 if both are equal,
                           as for one right answer
        second stage:  r = c (1 + weight exp(-(l - N)^2 / (2 sigma^2))),  N = the prompt's target

    The second stage begins with iteration `second_from`, and opens every response with a sentence
    that says N: the median right length of the prompt's last visit in the first stage, or a smaller
    one since. A prompt without a target has no such sentence, and the median of the group's right
    lengths for N. A wrong or truncated response earns 0. The targets are remembered: a run that
    visits no prompt twice, or has fewer iterations, never meets one.

    The released code weighs the second stage by 0.8, and gives every response of the first two
    rewards, which shifts all of them; that is not copied.
    """

    source = (
        "Wu et al. 2025, arXiv 2507.15758; ZJU-REAL/LAPO@bd59dfd reward_func_stage1.py, "
        "reward_func_stage2.py"
    )
    standing = "code"

    weight: float = Field(default=0.7, ge=0, description="weight of the bonus, in both stages")
    low: float = Field(default=30.0, ge=0, le=100, description="percentile of the right lengths")
    high: float = Field(default=70.0, ge=0, le=100, description="percentile of the right lengths")
    slope: float = Field(default=100.0, gt=0, description="tokens over which the bonus falls to 0")
    second_from: PositiveInt | None = Field(
        default=None,
        description="iteration with which the second stage begins; without it there is none",
    )
    sigma: float = Field(default=120.0, gt=0, description="tokens, in the second stage")
    opening: Annotated[str, tells("budget")] = Field(
        default="I will answer the question with {budget} tokens.\n",
        description="what responses of the second stage begin with, neither counted nor trained on",
    )

    @model_validator(mode="after")
    def _low_is_below_high(self) -> LAPO:
        if self.low >= self.high:
            raise ValueError(
                f"method.low: {self.low:g} is not below method.high = {self.high:g}: no response "
                "would get the bonus"
            )
        return self

    def ask(self, visit: Visit, known: Known) -> Ask:
        target = known.state.get("targets", {}).get(visit.prompt.id)
        if not self._is_second(known.step) or target is None:
            return Ask()
        return self._opened(visit, target)

    def longest_asks(self, visit: Visit, known: Known) -> Sequence[Ask]:
        """The second stage's, with targets of the most digits."""
        if self.second_from is None:
            return ()
        return [
            self._opened(visit, target)
            for target in range(max(1, known.limit - TRIED + 1), known.limit + 1)
        ]

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        seen = Outcomes.of(group, known.limit)
        if not self._is_second(known.step) or not seen.right.any():
            return self.rule(seen)
        target = group.group.note.get("target", float(np.median(seen.right_lengths)))
        return seen.right * (
            1.0 + self.weight * np.exp(-((seen.lengths - target) ** 2) / (2 * self.sigma**2))
        )

    def rule(self, group: Outcomes) -> FloatArray:
        accuracy = group.right.astype(np.float64)
        if not group.right.any():
            return accuracy
        low, high = np.percentile(group.right_lengths, [self.low, self.high])
        if low >= high:
            return accuracy
        outside = np.maximum(low - group.lengths, group.lengths - high)
        return accuracy * (1.0 + self.weight * np.clip(1.0 - outside / self.slope, 0.0, 1.0))

    def learn(self, state: State, groups: Sequence[Rewarded], known: Known) -> State:
        if self.second_from is None:
            return state
        targets = dict(state.get("targets", {}))
        for group in groups:
            lengths = Outcomes.of(group.graded, known.limit).right_lengths
            if not len(lengths):
                continue
            name = group.group.prompt.id
            median = float(np.median(lengths))
            before = targets.get(name) if self._is_second(known.step) else None
            targets[name] = median if before is None else min(before, median)
        return {"targets": targets}

    def _opened(self, visit: Visit, target: float) -> Ask:
        told = self.opening.replace("{budget}", f"{target:.0f}")
        return Ask(scripts=(Opened(opening=told),) * visit.samples, note={"target": target})

    def _is_second(self, step: int) -> bool:
        return self.second_from is not None and step >= self.second_from
