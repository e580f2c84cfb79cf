"""Search over steps of reasoning, by a scorer: beams that are grown, scored and cut back within one
response.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from megatron_efr.config.plugins import load_function, registered
from megatron_efr.scripts.kinds import Kind, Steps, Texts
from megatron_efr.steps import Fork, Score, Step, Take
from megatron_efr.types import Done, Prompt

Scorer = Callable[[Prompt, Sequence[str]], Sequence[float]]
"""Score each text as the beginning of a response to the prompt: higher is better."""

GROUP = "megatron_efr.scorers"
"""The entry points of third parties' scorers."""

SCORERS: Mapping[str, str] = {"verifier": "megatron_efr.grading.scoring:verified"}
"""Our own scorers, by name."""


class _Beam(NamedTuple):
    """A beginning of a response; `ending`: it goes no further, and why."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    text: str = ""
    ending: str = ""


class VgSearch(Kind):
    """Beam search with a scorer every `every` steps (variable granularity; hmarkc/VG-Search@1698233
    beam_search.py).

    A step ends with one of `ends`; a beam that has none within `tokens` tokens is cut there, and
    has ended. The best `beams` / `width` go on for `every` - 1 steps each, are copied to `beams`,
    take one step more, and are scored; in the last of `iterations`, 12 / `every` if not given, they
    go on to their end. The search is over when `beams` have ended, or all; the response is the
    ended one with the best score, the first of equals. Its length is its own: what the others drew
    is in no figure. It is for evaluations: what was chosen is no draw of the model's.

    `scorer`: `verifier` scores a text whose answer is right by 1 and others by 0, which is an upper
    bound, not a rule that could be used; or the name of an entry point of the group
    `megatron_efr.scorers`, a function of the prompt and the texts. The source has a process reward
    model, samples at temperature 0.8, and grows beams that have ended.
    """

    scorer: str = "verifier"
    beams: PositiveInt = 16
    width: PositiveInt = 4
    every: PositiveInt = 1
    iterations: PositiveInt | None = None
    ends: Texts = Field(
        default=("\n\n", ".\n\n", ":\n\n", " \n\n"), min_length=1, description="ends of a step"
    )
    tokens: PositiveInt = Field(default=2048, description="tokens of a step at most")

    @field_validator("scorer")
    @classmethod
    def _scorer_is_known(cls, name: str) -> str:
        if name not in SCORERS and name not in registered(GROUP):
            raise ValueError(
                f"no scorer {name!r}; there are {', '.join(sorted({*SCORERS, *registered(GROUP)}))}"
            )
        return name

    @model_validator(mode="after")
    def _beams_divide(self) -> Self:
        if self.beams % self.width:
            raise ValueError(f"beams: {self.beams} is no multiple of width = {self.width}")
        return self

    @property
    def until_any(self) -> tuple[str, ...]:
        return self.ends

    @property
    def trainable(self) -> bool:
        return False

    def check(self, limit: int, path: str) -> None:
        super().check(limit, path)
        scorer_of(self.scorer)  # before anything is asked

    def steps(self, sample: int) -> Steps:
        # about 12 steps deep, unless a number of rounds is given
        scorer = scorer_of(self.scorer)
        rounds = self.iterations or max(1, 12 // self.every)
        active = [_Beam()] * self.beams
        ended = list[tuple[float, _Beam]]()
        for number in range(rounds):
            # steps that are not scored between
            for _ in range(self.every - 1 if number else 0):
                active = yield from self._grow(active, self.ends)
            scored = yield from _scored([beam for beam in active if beam.ending], scorer)
            ended += scored
            active = [beam for beam in active if not beam.ending]
            if not active:
                break
            # copies draw apart from here: one step more, to the end in the last round
            active = (active * self.beams)[: self.beams]
            active = yield from self._grow(active, () if number == rounds - 1 else self.ends)
            scored = yield from _scored(active, scorer)
            ended += [pair for pair in scored if pair[1].ending]
            scored = [pair for pair in scored if not pair[1].ending]
            # enough have ended, or none is left to grow
            if len(ended) >= self.beams or not scored:
                break
            # the best go on
            best = sorted(scored, key=lambda pair: -pair[0])[: self.beams // self.width]
            active = [beam for _, beam in best]
        # the first of equals, as `max` has it
        chosen = max(ended, key=lambda pair: pair[0])[1]
        yield Take(
            "search",
            chosen.tokens,
            chosen.logprobs,
            "stop" if chosen.ending == "stop" else "length",
        )

    def _grow(
        self, beams: list[_Beam], ends: tuple[str, ...]
    ) -> Generator[Step, Done, list[_Beam]]:
        """Each beam with a step more; those that have ended stay as they are."""
        going = [beam for beam in beams if not beam.ending]
        if not going:
            return beams
        limit = self.tokens if ends else None
        after = tuple(beam.tokens for beam in going)
        done = yield Fork("step", (0,) * len(going), 1, "", limit, ends=ends, after=after)
        grown = iter(done.branches)
        return [beam if beam.ending else _longer(beam, next(grown).responses[0]) for beam in beams]


@cache
def scorer_of(name: str) -> Scorer:
    """The scorer of that name, loaded once: every response asks for it.

    ConfigError if a third party's does not load, or has another signature.
    """
    found = SCORERS.get(name, name)
    return load_function(found, GROUP, "evaluation.script.scorer", ("prompt", "texts"))


def _longer(beam: _Beam, step: Any) -> _Beam:
    last = step.parts[-1]
    ending = "" if last.name == "end" else last.ending
    logprobs = (*beam.logprobs, *step.logprobs.tolist())
    return _Beam((*beam.tokens, *step.tokens), logprobs, beam.text + step.text, ending)


def _scored(beams: list[_Beam], scorer: Scorer) -> Generator[Step, Done, list[tuple[float, _Beam]]]:
    if not beams:
        return []
    done = yield Score(tuple(beam.text for beam in beams), scorer)
    return list(zip(done.scores, beams, strict=True))
