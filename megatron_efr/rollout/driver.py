"""One response's script over an engine: steps in text become orders in tokens, and what was done
becomes parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from megatron_efr.rollout.codec import Codec
from megatron_efr.steps import Draw, Ending, Force, Fork, Part, Score, Step, Take
from megatron_efr.types import Branch, Done, Finish, IntArray, Prompt, Response, Sampling


class TokenPenalty(NamedTuple):
    """`Penalty`, in tokens."""

    tokens: tuple[int, ...]
    amount: float
    window: int

    def applies(self, said: Sequence[int]) -> bool:
        """True for the token behind `said`, which is all that the response has, or its last
        `window` tokens at least: its thought is younger than the window.
        """
        if len(said) < self.window:
            return True
        return not set(self.tokens).isdisjoint(said[len(said) - self.window + 1 :])


class Drawing(NamedTuple):
    """Draw to a stop id, to one of the tokens `until`, or to `limit` tokens, at least 1. A token of
    `until` is held back: it is the first token of a drawing that follows, and gives its place to
    one that is written. `temperature`: the drawing's own; None: that of the sampling. Then what its
    logits lose.
    """

    limit: int
    until: tuple[int, ...] = ()
    temperature: float | None = None
    penalty: TokenPenalty | None = None


class Writing(NamedTuple):
    """Write these tokens, with these log-probs; `ending` is what `Driver.done` is told of it."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    ending: Ending


class Forking(NamedTuple):
    """From each of the lengths `at`, and the tokens that stand behind it, make `samples` responses,
    each driven by a `Driver.branch`. What is held back stays so.
    """

    at: tuple[int, ...]
    samples: int
    after: tuple[tuple[int, ...], ...]

    @property
    def starts(self) -> list[tuple[int, tuple[int, ...]]]:
        """Each response's length of the present one, and the tokens behind it."""
        return [
            start for start in zip(self.at, self.after, strict=True) for _ in range(self.samples)
        ]


class Scoring(NamedTuple):
    """Call `scores`, which may take long, and tell `Driver.scored` what it gives."""

    scores: Callable[[], Sequence[float]]


Order = Drawing | Writing | Forking | Scoring


class Driver:
    """Drives one response's script: `order` is what the engine is to do now, None when the response
    is whole.

    The engine carries an order out and calls `done`, `forked` or `scored`. `parts`, `branches` and
    `finish` are the response's. All its drawings together have at most `sampling.max_new_tokens`
    tokens.
    """

    def __init__(
        self,
        steps: Generator[Step, Done, None],
        sampling: Sampling,
        codec: Codec,
        prompt: Prompt | None = None,
    ) -> None:
        self.parts: list[Part] = []
        self.branches: list[Branch] = []
        self.order: Order | None = None
        self._steps = steps
        self._sampling = sampling
        self._codec = codec
        self._left = sampling.max_new_tokens
        self._prompt = prompt
        self._take(next(steps))

    @property
    def finish(self) -> Finish:
        """length: the last draw was cut."""
        drawn = [part.ending for part in self.parts if part.ending in ("stop", "until", "length")]
        return "length" if drawn[-1:] == ["length"] else "stop"

    @property
    def holds(self) -> bool:
        """True while a token is held back."""
        return bool(self.parts) and self.parts[-1].ending == "until"

    def done(
        self, tokens: Sequence[int] | IntArray, ending: Ending, met: int | None = None
    ) -> None:
        """The order to draw or to write is carried out: the response has these tokens, without
        `met`, which is held back.
        """
        part = self._note(len(tokens), ending)
        text = ""
        if isinstance(self._step, Draw | Take):
            self._left -= part.end - part.start
            text = (
                self._decoded(tokens[part.start :])
                if isinstance(self._step, Draw) and self._step.told
                else ""
            )
        self._send(Done(part, "" if met is None else self._text_of(met), text=text))

    def _decoded(self, tokens: Sequence[int] | IntArray) -> str:
        return self._codec.decode([int(token) for token in tokens]) if len(tokens) else ""

    def forked(self, responses: Sequence[Response]) -> None:
        """The order to fork is carried out: the responses of all branches, in the order of their
        starts.
        """
        fork = self._step
        assert isinstance(fork, Fork)
        told = [
            each if each.text else replace(each, text=self._codec.decode(each.tokens))
            for each in responses
        ]
        each = [
            tuple(told[first : first + fork.samples]) for first in range(0, len(told), fork.samples)
        ]
        branches = tuple(
            Branch(fork.part, at, made) for at, made in zip(fork.at, each, strict=True)
        )
        if not fork.after:
            self.branches += branches
        self._send(Done(self._nothing(fork.part), branches=branches))

    def scored(self, scores: Sequence[float]) -> None:
        """The order to score is carried out."""
        self._send(Done(self._nothing("score"), scores=tuple(scores)))

    def branch(self, number: int) -> Driver:
        """A driver for one branch of the fork that is the order now, by its place among
        `Forking.starts`.
        """
        fork, sampling = self._step, self._sampling
        assert isinstance(fork, Fork)
        if fork.after:  # what stands behind the response may become the response's own
            left = max(0, self._left - len(fork.after[number // fork.samples]))
            sampling = replace(sampling, max_new_tokens=left)
        return Driver(branch_steps(fork), sampling, self._codec)

    @property
    def _length(self) -> int:
        """Tokens that the parts have."""
        return self.parts[-1].end if self.parts else 0

    def _send(self, done: Done) -> None:
        """Tell the script what was done, and take its next step."""
        try:
            step = self._steps.send(done)
        except StopIteration:
            self.order = None
        else:
            self._take(step)

    def _take(self, step: Step) -> None:
        """Make an order of a step. A draw when no token is left is cut at once."""
        # after a stop token the response is over; only questions about it may follow
        if not isinstance(step, Fork | Score) and self.parts and self.parts[-1].ending == "stop":
            raise RuntimeError(
                f"the step {step.part!r} comes after a stop token: a script may only fork there"
            )
        # each kind of step as an order in tokens
        self._step = step
        match step:
            case Draw(_, limit, until, temperature, penalty, _):
                limit = self._left if limit is None else min(limit, self._left)
                lowered = penalty and TokenPenalty(
                    self._tokens(penalty.texts), penalty.amount, penalty.window
                )
                self.order = Drawing(limit, self._tokens(until), temperature, lowered)
                # no token is left: the script hears so, and nobody is asked
                if not limit:
                    self._send(Done(self._note(self._length, "length")))
            case Force(_, text, chance):
                # a choice that was drawn has its chance on its first token; forced tokens have none
                tokens = self._codec.encode(text)
                first = 0.0 if chance is None else math.log(chance)
                self.order = Writing(
                    tokens,
                    (first, *[0.0] * (len(tokens) - 1)),
                    "forced" if chance is None else "chosen",
                )
            case Take(_, tokens, logprobs, ending):
                # tokens that another response drew, as far as there is room
                ending = ending if len(tokens) <= self._left else "length"
                self.order = Writing(tokens[: self._left], logprobs[: self._left], ending)
                if not self.order.tokens:
                    self._send(Done(self._note(self._length, "length")))
            case Score(texts, scorer):
                self.order = Scoring(partial(scorer, self._prompt, texts))
            case Fork(_, at, samples):
                # branches start within the response, and leave it as it is
                if not all(0 <= start <= self._length for start in at):
                    raise RuntimeError(
                        f"the step {step.part!r} forks at {at}, and the response has "
                        f"{self._length} tokens"
                    )
                self.order = Forking(at, samples, step.after or ((),) * len(at))
                if not at:
                    self.forked([])

    def _nothing(self, name: str) -> Part:
        return Part(name, self._length, self._length, "forced")

    def _note(self, length: int, ending: Ending) -> Part:
        assert not isinstance(self._step, Score)
        part = Part(self._step.part, self._length, length, ending)
        self.parts.append(part)
        return part

    def _tokens(self, texts: Sequence[str]) -> tuple[int, ...]:
        return tuple(token for text in texts if (token := self._token(text)) is not None)

    def _token(self, text: str) -> int | None:
        """The token of a text that is a single one; those that must be were checked before work
        began.
        """
        tokens = self._codec.encode(text)
        return tokens[0] if len(tokens) == 1 else None

    def _text_of(self, met: int) -> str:
        """The text of the present draw's `until` whose token this is."""
        assert isinstance(self._step, Draw)
        return next(text for text in self._step.until if self._token(text) == met)


def branch_steps(fork: Fork) -> Generator[Step, Done, None]:
    """The steps of each of a fork's branches."""
    if fork.opening:
        yield Force("opening", fork.opening)
    done = yield Draw(fork.part, fork.limit, (*fork.until, *fork.ends), fork.temperature)
    if done.part.ending == "until" and done.met in fork.ends:
        yield Draw("end", 1, (), fork.temperature)
