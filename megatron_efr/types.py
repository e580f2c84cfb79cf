"""Types that rooms hand to each other: prompts, requests, responses, groups, grades, credits."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_efr.errors import UserError as UserError
from megatron_efr.steps import Part, Step

Finish = Literal["stop", "length", "abort"]
FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.integer[Any]]
BoolArray = npt.NDArray[np.bool_]
T = TypeVar("T", covariant=True)


CORRECT = "correct"
"""The status of a right answer: a verifier compared it with the gold answer."""


class ByIndex(Protocol[T]):
    """A list, or a dict that has some of a list's entries."""

    def __getitem__(self, index: int, /) -> T: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """One rendered question.

    `id` is stable across epochs and resumes (it names the row, not the visit); `tokens` is what the
    model reads, the chat template's own ids; `gold` is the reference answer as text; `meta` may
    carry dataset, difficulty, budget.
    """

    id: str
    tokens: tuple[int, ...]
    text: str
    gold: str
    meta: Mapping[str, Any] = field(default_factory=dict)


class Marks(NamedTuple):
    """The texts around a thought, as responses have them. `opens` is empty if the chat template
    alone opens it.
    """

    opens: str
    closes: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """Options of drawing. A response ends with the first of `stop_ids`, or at `max_new_tokens`.

    The stop id is part of the response. `temperature` 0 is greedy; `top_p` is in (0, 1].
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    stop_ids: tuple[int, ...]


class Branch(NamedTuple):
    """Responses that go on from the first `at` tokens of another one, in the part of that name;
    their tokens are those that follow.
    """

    part: str
    at: int
    responses: tuple[Response, ...]


class Done(NamedTuple):
    """Outcome of a step, as its script hears it.

    The part (of a fork an empty one, and the branches), the text of `until` before which a draw
    ended, the scores that were asked for, and the text of a draw that was to be told.
    """

    part: Part
    met: str = ""
    branches: tuple[Branch, ...] = ()
    scores: tuple[float, ...] = ()
    text: str = ""


class Script(Protocol):
    """A recipe for one response. Frozen, so that it is journalled, compared and printed."""

    @property
    def until(self) -> tuple[str, ...]:
        """The texts before which its draws end. Each must be a single token."""
        ...

    @property
    def until_any(self) -> tuple[str, ...]:
        """More such texts: those that are single tokens end a draw, as at least one must be, if
        there are any.
        """
        ...

    @property
    def forced(self) -> tuple[str, ...]:
        """The texts that it writes, at most, each as often as it does."""
        ...

    @property
    def branches(self) -> tuple[str, int] | None:
        """The opening of its branches, and how many tokens they draw at most; None if no branch is
        longer than the response may be.
        """
        ...

    @property
    def penalised(self) -> tuple[str, ...]:
        """The texts whose logits its draws lower; each must be a single token."""
        ...

    @property
    def trainable(self) -> bool:
        """True if what it draws is the model's own: then it may be trained on."""
        ...

    @property
    def behind(self) -> str:
        """The text that an evaluation writes behind each question."""
        ...

    def within(self, limit: int) -> Script:
        """The script with what it takes from `limit`, the tokens of a response at most."""
        ...

    def check(self, limit: int, path: str) -> None:
        """Refuse, with a ConfigError that names the key within `path`, what `limit` tokens cannot
        do.
        """
        ...

    def steps(self, sample: int) -> Generator[Step, Done, None]:
        """The steps of sample number `sample` of a group. After a draw that ended with `stop` it
        may only fork.
        """
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """Ask for responses to `prompt`, one by each script; sample j's random numbers are a function
    of (seed, j, position in the response) only. `note` is whatever the asker wants to find again
    with the answers, JSON-ready.
    """

    prompt: Prompt
    seed: int
    scripts: tuple[Script, ...]
    note: Mapping[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return len(self.scripts)


class VersionSpan(NamedTuple):
    """Tokens [start, end) of a response were made with weights `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """One generated answer: token ids with the stop token, and one log-prob per token at the
    sampling temperature.

    `logprobs` are the engine's, before top-p, fp32 [tokens]; of a token that a script wrote, the
    log of the chance with which it did, 0 without one. The policy's own, which ratio and KL use,
    are computed later and never stored here. `text` is the decoded response without special tokens;
    an engine without a tokenizer leaves it empty. `parts` tile it; none: all of it was drawn at
    once. `routed_experts` are the experts that the engine chose in every layer for every token that
    it read, the prompt's first: integers [prompt + response - 1, layers, experts per token].
    Nothing was read behind the last token, so it has none.
    """

    tokens: tuple[int, ...]
    logprobs: FloatArray
    finish: Finish
    versions: tuple[VersionSpan, ...] = ()
    text: str = ""
    routed_experts: np.ndarray | None = None  # a mixture of experts, and an engine that tells
    parts: tuple[Part, ...] = ()
    branches: tuple[Branch, ...] = ()

    @property
    def answers(self) -> tuple[tuple[int, Response], ...]:
        """The responses of its branches, all in one row, each with the length from which it goes
        on.
        """
        return tuple((branch.at, each) for branch in self.branches for each in branch.responses)

    @property
    def trained(self) -> BoolArray:
        """The tokens that the policy may be trained on, bool [tokens]: all but those that a script
        forced.
        """
        trained = np.ones(len(self.tokens), dtype=bool)
        for part in self.parts:
            trained[part.start : part.end] = not part.forced
        return trained

    @property
    def length(self) -> int:
        """Generated tokens, the stop token included, without those that a script forced."""
        return len(self.tokens) - sum(part.end - part.start for part in self.parts if part.forced)

    @property
    def truncated(self) -> bool:
        """True when its last draw was cut, so that it did not end by itself: it is wrong, and
        enters no length statistic.
        """
        return self.finish != "stop"


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """One prompt and its n responses, as an engine gives them; a method sees whole groups only.

    From here a group goes through `Graded` and `Rewarded` to `Credited`: each stage holds the one
    before it.
    """

    prompt: Prompt
    responses: tuple[Response, ...]
    seed: int = 0  # the request's: it names this visit of the prompt
    # the request's, as is the note; none: every response was drawn at once
    scripts: tuple[Script, ...] = ()
    note: Mapping[str, Any] = field(default_factory=dict)

    @property
    def lengths(self) -> IntArray:
        """Generated tokens per response, int64 [n]."""
        return np.array([r.length for r in self.responses], dtype=np.int64)

    @property
    def truncated(self) -> BoolArray:
        """Responses that hit the token limit, bool [n]."""
        return np.array([r.truncated for r in self.responses], dtype=bool)


@dataclass(frozen=True, slots=True)
class Grade:
    """The verdict on one response; `status` is one of `grading.STATUSES`, or `truncated`.

    correct, wrong: the verifier compared the answer with the gold. no_answer: the response has none
    where it is looked for (with last_box: no box, an empty one, or a last box that never closes).
    unparsed: the verifier cannot read the answer. timeout: the CPU limit. memory: the memory limit.
    crash: the verifier raised, or its process died or hung without using CPU. bad_gold: the
    verifier cannot read the gold. `answer` is what was found, `reason` what the verifier said;
    `partial` its score if it gave one, or the mean of several verifiers' scores by weight.
    """

    status: str
    partial: float | None = None
    answer: str | None = field(default=None, compare=False)
    reason: str = field(default="", compare=False)

    @property
    def correct(self) -> bool:
        return self.status == CORRECT

    @property
    def score(self) -> float:
        """From 0 to 1: the verifiers' own, or 1 if the answer is correct."""
        return float(self.correct) if self.partial is None else self.partial


@dataclass(frozen=True, slots=True, eq=False)
class Graded:
    """A group and the verdicts on its responses, [n].

    `branches`: for each response the verdicts on the answers of its branches, in their order;
    empty: not asked for.
    """

    group: Group
    grades: tuple[Grade, ...]
    branches: tuple[tuple[Grade, ...], ...] = ()

    @property
    def correct(self) -> BoolArray:
        """Right responses, bool [n]. One that was cut off is wrong."""
        return np.array([grade.correct for grade in self.grades], dtype=bool)

    @property
    def scores(self) -> FloatArray:
        """The verifiers' scores, 0 to 1, float64 [n]; 1 or 0 if they say yes or no."""
        return np.array([grade.score for grade in self.grades], dtype=np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Rewarded:
    """A graded group and what the method gives for its responses, float64 [n]."""

    graded: Graded
    rewards: FloatArray

    @property
    def group(self) -> Group:
        return self.graded.group


class Credit(NamedTuple):
    """Credit of a group's n responses: what the loss multiplies their log-probs with.

    `advantage` float64 [n]; `per_token`, added to it, and `weight` in the loss, at least 0, have an
    array for each response: one number for each of its tokens, those included that a script wrote.
    None: nothing is added, and each token weighs 1. `masked`, bool [n], are responses that are left
    out of the loss; None: none.

    `branches`: for each response the advantages of its `answers`, float64, which are then trained
    on as samples of their own; an empty array: not those of this response. None: no branch is
    trained on. `beginnings`: what an answer goes on from is trained on with it, and not merely
    read.
    """

    advantage: FloatArray
    per_token: tuple[FloatArray, ...] | None = None
    weight: tuple[FloatArray, ...] | None = None
    masked: BoolArray | None = None
    branches: tuple[FloatArray, ...] | None = None
    beginnings: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Credited:
    """A rewarded group and its credit: what is trained on, kept with the rollouts and replayed.

    UserError for a credit that is not of the group's shape, or a weight that is not a finite number
    of at least 0.
    """

    rewarded: Rewarded
    credit: Credit

    def __post_init__(self) -> None:
        _check_credit(self.credit, self.group)

    @property
    def graded(self) -> Graded:
        return self.rewarded.graded

    @property
    def group(self) -> Group:
        return self.rewarded.graded.group


def _check_credit(credit: Credit, group: Group) -> None:
    lengths = [len(response.tokens) for response in group.responses]
    where = f"method: the credit of prompt {group.prompt.id}"
    # a number for each response
    for name in ("advantage", "masked"):
        values = getattr(credit, name)
        if values is not None and np.shape(values) != (len(lengths),):
            raise UserError(
                f"{where}: {name} is {list(np.shape(values))}, and the group has {len(lengths)} "
                "responses"
            )
    # a number for each token
    for name in ("per_token", "weight"):
        values = getattr(credit, name)
        if values is not None and [np.shape(each) for each in values] != [
            (length,) for length in lengths
        ]:
            found = ", ".join(str(list(np.shape(each))) for each in values)
            raise UserError(f"{where}: {name} is {found}, and the responses have {lengths} tokens")
    # branches of a response: an advantage for each, or for none
    if credit.branches is not None:
        given, there = (
            [len(each) for each in credit.branches],
            [len(each.answers) for each in group.responses],
        )
        if len(given) != len(there) or any(
            g not in (0, t) for g, t in zip(given, there, strict=True)
        ):
            raise UserError(
                f"{where}: branches is of {given} advantages, and the responses' branches have "
                f"{there}"
            )
    # a negative weight would turn the objective round, a nan would reach every gradient
    for number, weight in enumerate(credit.weight or ()):
        if not np.all(np.isfinite(weight) & (np.asarray(weight) >= 0)):
            raise UserError(
                f"{where}: a weight of response {number} is negative or not finite; 0 leaves a "
                "token out"
            )
