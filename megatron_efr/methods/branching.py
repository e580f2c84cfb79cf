"""Responses that are also left early: the answer that a thought gives before its end is judged, and
trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from megatron_efr.config import ConfigError, RolloutConfig
from megatron_efr.methods.base import Ask, Choices, Known, Method, Needs, Visit
from megatron_efr.methods.plain import Outcomes
from megatron_efr.scripts import Exits, Forks
from megatron_efr.types import BoolArray, Credit, FloatArray, Graded, Response, Rewarded

Share = Annotated[float, Field(gt=0, lt=1)]
Token = Annotated[str, Field(min_length=1)]


class Branching(Method):
    """A method that has each response left early, and its answers there judged."""

    needs = Needs(branches=True)

    answer_tokens: PositiveInt = Field(
        default=256,
        description=(
            "tokens of an early answer at most; it is judged by what it has if that cuts it off"
        ),
    )
    end: Token = Field(default="</think>", description="the single token that ends a thought")

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        return Outcomes.of(group, known.limit).right.astype(np.float64)


class Anytime(Branching):
    """AnytimeReasoner (BRPO): a thought is to be worth its tokens at every budget.

        f_s = share of right ones among the answers at budget s of S, counted from 0;
            P = prior over budgets
        R_s = sum over k >= s of P_k f_k
        A_s = R_s - (s V1 + (S - s) V2) / S,
            of the tokens of the thought between budget s - 1 and s
        V1 = P(k >= s) sum over k < s of 2^k f_k / sum of 2^k,  V2 = mean R_s of the group
        A = f - mean f of the answers at the same budget,
            of an answer; of `answers` 1 the group's mean at that budget

    r = R_0. A thought that ends by itself is answered after its own end for all budgets that it
    does not reach; one that ends the response is wrong at those. A wrong answer counts 0, and so
    does one that ends a thought once more; a truncated response, whose thought was cut at the last
    budget, counts by its answers like any other. Nothing is remembered.

    The answer that a response goes on to by itself is judged for the figures, and not trained on:
    the source does not draw it. Its loss is a sum over tokens, divided by a constant:
    `algorithm.name: dr_grpo`.
    """

    source = (
        "Qi et al. 2025, arXiv 2505.13438; sail-sg/AnytimeReasoner@7e3f5bb verl/trainer/ppo/brpo.py"
    )
    standing = "code"
    wrong_may_win = "it is right at more or likelier budgets before"

    budgets: Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)] = Field(
        default=(2000, 4000, 6000, 8000),
        description="tokens of thought, ascending; a thought is cut at the last",
    )
    prior: Literal["uniform", "linear", "last"] = Field(
        default="uniform",
        description="how likely a budget is: all alike, by its number of tokens, or the last alone",
    )
    answers: PositiveInt = Field(default=4, description="answers at each budget")
    answer_tokens: PositiveInt = Field(
        default=118,
        description=(
            "tokens of an early answer at most; it is judged by what it has if that cuts it off"
        ),
    )
    cut: Token = Field(
        default="...\n\n...\n\n</think>\n\n**Final Answer**\n",
        description="what opens an answer of a thought cut short",
    )
    ended: Token = Field(
        default="\n\n**Final Answer**\n",
        description="what opens an answer of a thought that has ended",
    )

    @model_validator(mode="after")
    def _budgets_ascend(self) -> Anytime:
        if list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError(
                f"method.budgets: {', '.join(map(str, self.budgets))} do not ascend; put them in "
                "order"
            )
        return self

    def ask(self, visit: Visit, known: Known) -> Ask:
        script = Forks(
            at=self.budgets,
            samples=self.answers,
            tokens=self.answer_tokens,
            opening=self.cut,
            end=self.end,
            ended=self.ended,
        )
        return Ask(scripts=(script,) * visit.samples)

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        return self._scores(group).mean(-1) @ self._prior

    def credits(self, groups: Sequence[Rewarded], known: Known) -> Sequence[Credit]:
        return [self._credit(group.graded) for group in groups]

    def check(self, rollout: RolloutConfig) -> None:
        if self.budgets[-1] > rollout.max_new_tokens:
            raise ConfigError(
                f"method.budgets: no thought reaches {self.budgets[-1]} tokens with "
                f"rollout.max_new_tokens = {rollout.max_new_tokens}; raise that to "
                f"{self.budgets[-1]} or more, or lower the budgets"
            )

    def check_algorithm(self, algorithm: Choices) -> None:
        if algorithm.truncated == "masked":
            raise ConfigError(
                "algorithm.truncated: masked leaves out thoughts that are cut at the last budget, "
                "and method anytime is to teach by them; set algorithm.truncated: wrong"
            )

    @property
    def _prior(self) -> FloatArray:
        weights = {
            "uniform": np.ones(len(self.budgets)),
            "linear": np.array(self.budgets, dtype=np.float64),
            "last": np.eye(len(self.budgets))[-1],
        }[self.prior]
        return weights / weights.sum()

    def _credit(self, graded: Graded) -> Credit:
        scores = self._scores(graded)
        responses = graded.group.responses
        advantages = brpo_advantages(scores.mean(-1), self._prior)
        per_token, weight, branches = [], [], []
        for i, response in enumerate(responses):
            tokens = np.arange(len(response.tokens))
            budget = np.minimum(
                np.searchsorted(self.budgets, tokens, side="right"), len(self.budgets) - 1
            )
            per_token.append(advantages[i, budget] - advantages[i, 0])
            weight.append((tokens < thought(response, closed=True)).astype(np.float64))
            branches.append(self._answer_advantages(scores, i, response))
        return Credit(advantages[:, 0], tuple(per_token), tuple(weight), branches=tuple(branches))

    def _answer_advantages(self, scores: FloatArray, i: int, response: Response) -> FloatArray:
        """Of the answers that response i has: less the mean of those after the same tokens."""
        own = scores[i]
        reached = self._reached(response)
        if self.answers == 1:
            made = own - scores.mean(0)
        else:
            made = own - own.mean(-1, keepdims=True)
            made[reached:] = own[reached:] - (own[reached:].mean() if reached < len(own) else 0.0)
        return made.ravel()[: len(response.answers)]

    def _scores(self, graded: Graded) -> FloatArray:
        """Right answers, float64 [n, S, answers] by response and budget; 0: wrong or none."""
        made = np.zeros((len(graded.grades), len(self.budgets) * self.answers))
        opened = {"summary": self.cut.count(self.end), "ended": self.ended.count(self.end)}
        for row, response, right in zip(
            made, graded.group.responses, tried_answers(graded), strict=True
        ):
            answers = [
                (branch.part, each.text)
                for branch in response.branches
                for each in branch.responses
            ]
            once = [text.count(self.end) <= opened[part] for part, text in answers]
            row[: len(right)] = right & np.array(once[: len(right)], dtype=bool)
        return made.reshape(-1, len(self.budgets), self.answers)

    def _reached(self, response: Response) -> int:
        """Number of budgets that its thought reached."""
        return sum(branch.part == "summary" for branch in response.branches)


class MRT(Branching):
    """MRT, in the form of its README: a response is compared with what it would have earned had it
    stopped on its way.

        A = c - c_stop,  c_stop = share of right ones among `answers` after a part of the thought

    The end of a thought is drawn, each of its tokens equally likely; the README is silent, and this
    is the paper's way. A thought of a single token has no stop, and c_stop = 0. A wrong or
    truncated response has c = 0, and so never more than 0. Nothing is remembered. Answers at stops
    are not trained on. The paper weighs the progress of every episode with alpha; of that no code
    is released, and it is not in here.
    """

    source = "Qu et al. 2025, arXiv 2503.07572; CMU-AIRe/MRT@1815a8c train/rl/README.md"
    standing = "code"

    needs = Needs(samples=1, branches=True)

    answers: PositiveInt = Field(default=1, description="answers at the stop")
    stop: Token = Field(
        default="\n</think>\n\n**Final Answer**\n",
        description="text that ends the thought and opens an answer at a stop",
    )

    def ask(self, visit: Visit, known: Known) -> Ask:
        script = Exits(
            drawn=1,
            seed=visit.seed,
            samples=self.answers,
            tokens=self.answer_tokens,
            opening=self.stop,
            end=self.end,
        )
        return Ask(scripts=(script,) * visit.samples)

    def credits(self, groups: Sequence[Rewarded], known: Known) -> Sequence[Credit]:
        return [
            Credit(group.rewards - [_share(right) for right in tried_answers(group.graded)])
            for group in groups
        ]


class SGRPO(Branching):
    """S-GRPO: one thought, left at several places; the earlier a right answer, the more it earns.

        r = 1 / 2^(N - 1) of a right answer,
            N = right ones so far, in order of their exits, the whole response last
        A = r - mean of the response and its exits

    A wrong or truncated response, and a wrong answer at an exit, earn 0. A response without any
    right answer is left out, with its exits. Nothing is remembered. Each response is a group with
    its own exits, so one for each prompt is enough, as in the source (`algorithm: {name: grpo,
    baseline: none, normalize: none}`).

    An exit is trained on with the thought up to it, but for the text that leaves it. The number of
    tokens of an answer is this project's. The source averages over each sequence first:
    `algorithm.aggregate: sequence`.
    """

    source = "Dai et al. 2025, arXiv 2505.07686, algorithm 1"
    standing = "text"
    wrong_may_win = (
        "the right one comes after right exits of its own thought, and the wrong one's exits are "
        "wrong"
    )

    needs = Needs(samples=1, branches=True)

    exits: PositiveInt = Field(
        default=8, description="places at which a thought is left, each equally likely"
    )
    stop: Token = Field(
        default="Time is limited, stop thinking and start answering.\n</think>\n\n",
        description="text that ends the thought and opens an answer",
    )

    def ask(self, visit: Visit, known: Known) -> Ask:
        script = Exits(
            drawn=self.exits,
            seed=visit.seed,
            tokens=self.answer_tokens,
            opening=self.stop,
            end=self.end,
        )
        return Ask(scripts=(script,) * visit.samples)

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        return np.array([s_grpo_rewards(right)[-1] for right in self._serial(group, known)])

    def credits(self, groups: Sequence[Rewarded], known: Known) -> Sequence[Credit]:
        return [self._credit(group.graded, known) for group in groups]

    def _credit(self, group: Graded, known: Known) -> Credit:
        serial = self._serial(group, known)
        made = [s_grpo_rewards(right) for right in serial]
        advantages = [rewards - rewards.mean() for rewards in made]
        return Credit(
            np.array([each[-1] for each in advantages]),
            masked=np.array([not right.any() for right in serial]),
            branches=tuple(
                each[:-1] if r.any() else each[:0]
                for each, r in zip(advantages, serial, strict=True)
            ),
            beginnings=True,
        )

    def _serial(self, group: Graded, known: Known) -> list[BoolArray]:
        """Of each response, which of its exits are right, and last whether it is itself."""
        right = Outcomes.of(group, known.limit).right
        return [
            np.append(tried, whole)
            for tried, whole in zip(tried_answers(group), right, strict=True)
        ]


class JET(Branching):
    """JET: whole and shortened responses in one group, and the shortest right one earns most.

        r = (1 - form) c + form [answered]  + c (alpha (1 - least) t + least)
        t = (lmax - l) / (lmax - lmin + 1e-8),
            of the right ones of the group, shortened ones among them
        A = (r - mean) / (std + 1e-6) over all of them, sample deviation

    A shortened response is a share of the thought, a text that stops it, and an answer; it is
    trained on whole, but for that text, which the released code trains on too. A wrong or truncated
    response earns `form` at most. Nothing is remembered. Lengths are drawn tokens.

    The released code takes lmin and lmax over the whole batch, and shares of a response's
    characters; neither is copied. There an answer ends with the sentence of its box, and is made to
    stop there; here it goes on to its own end. Source: 3 whole responses of each prompt, and 9
    shortened ones.
    """

    source = (
        "Han et al. 2025, arXiv 2509.23392; JinyiHan99/Just-Enough-Think@89cf33e "
        "vllm_rollout_spmd.py, math.py"
    )
    standing = "code"

    shares: Annotated[tuple[Share, ...], Field(strict=False, min_length=1)] = Field(
        default=(0.25, 0.5, 0.75), description="shares of the thought that shortened responses keep"
    )
    answer_tokens: PositiveInt = Field(
        default=50,
        description=(
            "tokens of an early answer at most; it is judged by what it has if that cuts it off"
        ),
    )
    stop: Token = Field(
        default="\n\nWait, I have enough information to get the final answer.</think>"
        "\n\nTherefore, the final answer is \\boxed{",
        description="text that ends the thought and opens an answer",
    )
    form: float = Field(default=0.1, ge=0, le=1, description="weight of having answered at all")
    alpha: float = Field(default=1.2, ge=0, description="weight of brevity")
    least: float = Field(
        default=0.05, ge=0, le=1, description="reward of the longest right response for brevity"
    )

    def ask(self, visit: Visit, known: Known) -> Ask:
        script = Exits(
            shares=self.shares, tokens=self.answer_tokens, opening=self.stop, end=self.end
        )
        return Ask(scripts=(script,) * visit.samples)

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        return self._all(group, known)[: len(group.grades)]

    def credits(self, groups: Sequence[Rewarded], known: Known) -> Sequence[Credit]:
        return [self._credit(group.graded, known) for group in groups]

    def rule(self, right: BoolArray, lengths: FloatArray, answered: BoolArray) -> FloatArray:
        """Rewards of whole and shortened responses together, float64 [n]."""
        made = (1 - self.form) * right + self.form * answered
        if right.any():
            longest = lengths[right].max()
            shortest = lengths[right].min()
            brevity = (longest - lengths) / (longest - shortest + 1e-8)
            made = made + right * (self.alpha * (1 - self.least) * brevity + self.least)
        return made

    def _all(self, group: Graded, known: Known) -> FloatArray:
        """Rewards of the whole responses, and behind them those of all shortened ones."""
        whole = Outcomes.of(group, known.limit)
        tried = tried_answers(group)
        answers = [
            answer
            for response in group.group.responses
            for answer in response.answers
            if group.branches
        ]
        lengths = [at + answer.length for at, answer in answers]
        answered = [grade.status != "no_answer" for each in group.branches for grade in each]
        return self.rule(
            np.concatenate([whole.right, *tried]),
            np.concatenate([whole.lengths, lengths]),
            np.concatenate([whole.answered, np.array(answered, dtype=bool)]),
        )

    def _credit(self, group: Graded, known: Known) -> Credit:
        rewards = self._all(group, known)
        count = len(group.grades)
        spread = rewards.std(ddof=1) if len(rewards) > 1 else 0.0
        advantages = (rewards - rewards.mean()) / (spread + 1e-6)
        ends = np.cumsum([count, *(len(each) for each in tried_answers(group))])
        return Credit(
            advantages[:count], branches=tuple(np.split(advantages, ends)[1:-1]), beginnings=True
        )


def brpo_advantages(scores: FloatArray, prior: FloatArray) -> FloatArray:
    """BRPO's advantages [n, S] of n thoughts between S budgets, from their scores [n, S] and the
    budgets' prior [S].
    """
    count = scores.shape[1]
    made = np.empty_like(scores)
    for s in range(count):
        later = scores[:, s:] @ prior[s:]
        weights = 2.0 ** np.arange(s)
        before = scores[:, :s] @ weights / weights.sum() * prior[s:].sum() if s else 0.0
        made[:, s] = later - (s * before + (count - s) * later.mean()) / count
    return made


def s_grpo_rewards(right: BoolArray) -> FloatArray:
    """S-GRPO's rewards of answers in the order of their exits, float64 [n]."""
    return right * 2.0 ** (1 - np.cumsum(right))


def thought(response: Response, *, closed: bool = False) -> int:
    """The tokens of its thought, with the one that ends it if it is `closed`; all, if it was drawn
    at once.
    """
    if not response.parts:
        return len(response.tokens)
    first = response.parts[0]
    return first.end + (closed and first.ending == "until")


def tried_answers(group: Graded) -> list[BoolArray]:
    """Right early answers of each response, bool [answers] each."""
    verdicts = group.branches or ((),) * len(group.grades)
    return [np.array([grade.correct for grade in each], dtype=bool) for each in verdicts]


def _share(right: BoolArray) -> float:
    return float(right.mean()) if len(right) else 0.0
