"""The kinds of scripts: generators of steps that any engine drives, with their options as a section
has them.

`</think>` stands for the text that ends a thought; a model that has another is told so by the
option `end`.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Annotated, Self

import numpy as np
from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from megatron_efr.config import ConfigError, Section
from megatron_efr.steps import Draw, Force, Fork, Step
from megatron_efr.types import Branch, Done

Steps = Generator[Step, Done, None]
Texts = Annotated[tuple[str, ...], Field(strict=False)]  # a list in YAML and JSON
Lengths = Annotated[tuple[NonNegativeInt, ...], Field(strict=False)]
Token = Annotated[str, Field(min_length=1)]


class Kind(Section):
    """Base of scripts: by default one ends at no text, writes none and does not branch."""

    model_config = ConfigDict(frozen=True)

    @property
    def until(self) -> tuple[str, ...]:
        return ()

    @property
    def until_any(self) -> tuple[str, ...]:
        return ()

    @property
    def forced(self) -> tuple[str, ...]:
        return ()

    @property
    def branches(self) -> tuple[str, int] | None:
        return None

    @property
    def penalised(self) -> tuple[str, ...]:
        return ()

    @property
    def trainable(self) -> bool:
        return not self.penalised

    @property
    def behind(self) -> str:
        return ""

    def within(self, limit: int) -> Self:
        return self

    def check(self, limit: int, path: str) -> None:
        return


class Plain(Kind):
    """One draw, to its end."""

    def steps(self, sample: int) -> Steps:
        yield Draw("response")


class Opened(Kind):
    """A response whose beginning is given: NoThinking's empty thought, AdaptThink's first token.

    Sources: arXiv 2504.09858; 2505.13417: `chance` is the probability with which this opening was
    chosen.
    """

    opening: Token
    chance: float | None = Field(default=None, gt=0, le=1)
    limit: PositiveInt | None = Field(default=None, description="tokens that are drawn, at most")

    @property
    def forced(self) -> tuple[str, ...]:
        return (self.opening,)

    def steps(self, sample: int) -> Steps:
        yield Force("opening", self.opening, self.chance)
        yield Draw("response", self.limit)


class Budget(Kind):
    """A thought of at most `most` tokens, and an answer of at most `answer`.

    A thought that is longer is cut, and `cut` forced (Elastic Reasoning, arXiv 2505.05315). One
    that ends before `least` tokens goes on with `wait` forced in the place of its end, at most
    `waits` times (s1, arXiv 2501.19393).
    """

    most: PositiveInt
    answer: PositiveInt | None = None
    end: Token = Field(default="</think>", description="text that ends the thought: a single token")
    cut: Token = "\n</think>\n\n"
    least: int = Field(default=0, ge=0)
    wait: Token = "Wait"
    waits: PositiveInt = 1

    @model_validator(mode="after")
    def _least_is_below_most(self) -> Budget:
        if self.least > self.most:
            raise ValueError(
                f"least: {self.least} is above most = {self.most}, where the thought is cut"
            )
        return self

    @property
    def until(self) -> tuple[str, ...]:
        return (self.end,)

    @property
    def forced(self) -> tuple[str, ...]:
        return (self.cut, *([self.wait] * self.waits if self.least else []))

    def check(self, limit: int, path: str) -> None:
        check_answered(self.most, limit, path)

    def steps(self, sample: int) -> Steps:
        left, waits = self.most, self.waits
        while True:
            done = yield Draw("thought", left, self.until)
            left -= done.part.end - done.part.start
            if (
                done.part.ending != "until"
                or self.most - left >= self.least
                or not (waits and left)
            ):
                break
            waits -= 1
            yield Force("wait", self.wait)
        if done.part.ending == "stop":
            return
        if done.part.ending == "length":
            yield Force("cut", self.cut)
        yield Draw("answer", self.answer)


class EarlyExit(Kind):
    """A thought that is left as soon as the model is sure of its answer (as DEER, arXiv
    2504.15895).

    Before each of `pauses`, `probe` and up to `tokens` tokens of an answer are tried beside the
    response. If the mean of their log-probs is at least that of the probability `sure`, `exit`
    takes the place of the pause.
    """

    pauses: Texts = Field(
        default=("Wait",), min_length=1, description="texts that pause a thought: single tokens"
    )
    probe: Token = "\n\n**Final Answer**\n\\boxed{"
    probe_end: Texts = Field(default=(), description="single tokens that end an answer")
    tokens: PositiveInt = 20
    sure: float = Field(default=0.95, gt=0, le=1)
    tries: PositiveInt = Field(
        default=10, description="pauses that are probed; later ones are passed"
    )
    end: Token = Field(default="</think>", description="text that ends the thought: a single token")
    exit: Token = "\n</think>\n\n"

    @property
    def until(self) -> tuple[str, ...]:
        return (*self.pauses, self.end, *self.probe_end)

    @property
    def forced(self) -> tuple[str, ...]:
        return (self.exit,)

    @property
    def branches(self) -> tuple[str, int]:
        return self.probe, self.tokens

    def steps(self, sample: int) -> Steps:
        for number in range(self.tries):
            done = yield Draw("thought", None, (*self.pauses, self.end))
            if done.part.ending != "until":
                return
            if done.met == self.end:
                break
            tried = yield Fork(
                "probe", (done.part.end,), 1, self.probe, self.tokens, self.probe_end
            )
            if confidence(tried.branches[0]) >= self.sure:
                yield Force("exit", self.exit)
                break
            if text := self.unsure(sample, number):
                yield Force("phrase", text)
        yield Draw("answer")

    def unsure(self, sample: int, number: int) -> str:
        """The text that takes the place of pause `number` if the model is not sure; empty: the
        pause stays.
        """
        return ""


class Answered(Kind):
    """Base of a whole response that is answered from within its thought, in branches beside it."""

    samples: PositiveInt = 1
    tokens: PositiveInt = Field(description="tokens of a branch at most")
    opening: Token = "\n</think>\n\n"
    end: Token | None = Field(
        default=None, description="the single token that ends a thought; none: all is thought"
    )

    @property
    def until(self) -> tuple[str, ...]:
        return (self.end,) if self.end else ()

    @property
    def branches(self) -> tuple[str, int]:
        return self.opening, self.tokens


class Forks(Answered):
    """A whole response, and answers from the middle of its thought: what it would have said at each
    length `at`.

    Source: AnytimeReasoner's budgets (arXiv 2505.13438). `opening` ends the thought of a branch.
    Lengths that the thought did not reach have no branch; at 0 an answer is direct, without a
    thought. With `ended` they have: as many more samples from behind the thought's own end, with
    `ended` written there; and a thought is then cut at the last length.
    """

    at: Lengths = Field(min_length=1)
    ended: Token | None = Field(
        default=None, description="opening of the branches of a thought that has ended"
    )

    @model_validator(mode="after")
    def _ended_needs_end(self) -> Forks:
        if self.ended and not self.end:
            raise ValueError(
                "ended: a thought without `end` never ends by itself; say its end, or leave "
                "`ended` out"
            )
        return self

    @property
    def branches(self) -> tuple[str, int]:
        # no branch has more written tokens than both together
        return f"{self.opening}{self.ended or ''}", self.tokens

    def steps(self, sample: int) -> Steps:
        done = yield Draw(
            "thought" if self.end else "response", max(self.at) if self.ended else None, self.until
        )
        thought = done.part.end
        has_ended = done.part.ending == "until"
        if has_ended:
            yield Draw("answer")
        if reached := tuple(at for at in self.at if at <= thought):
            yield Fork("summary", reached, self.samples, self.opening, self.tokens)
        if (missed := len(self.at) - len(reached)) and has_ended and self.ended:
            yield Fork("ended", (thought + 1,), missed * self.samples, self.ended, self.tokens)


def check_answered(most: int | None, limit: int, path: str) -> None:
    """Refuse, with a ConfigError that names the key within `path`, a limit of the thought that
    leaves no answer.
    """
    if most is not None and most >= limit:
        raise ConfigError(
            f"{path}.most: a thought of {most} tokens uses up max_new_tokens = {limit}, and one "
            "that is cut has no answer; lower it, or raise max_new_tokens"
        )


def confidence(branch: Branch) -> float:
    """The geometric mean of the probabilities of a branch's drawn tokens; 0 without any."""
    response = branch.responses[0]
    drawn = response.logprobs[response.trained]
    return math.exp(float(np.mean(drawn, dtype=np.float64))) if len(drawn) else 0.0
