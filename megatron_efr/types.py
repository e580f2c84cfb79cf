"""What the rooms hand to each other: prompts, requests, responses, groups, grades and packed batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_efr.errors import UserError as UserError

if TYPE_CHECKING:  # grading processes import this module, and torch would take them seconds at every start
    import torch

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

    `id` is stable across epochs and resumes (it names the row, not the visit); `tokens` is what the model reads, the
    chat template's own ids; `gold` is the reference answer as text; `meta` may carry dataset, difficulty, budget.
    """

    id: str
    tokens: tuple[int, ...]
    text: str
    gold: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How responses are drawn. A response ends with (and includes) the first of `stop_ids`, or at `max_new_tokens`."""

    temperature: float
    top_p: float
    max_new_tokens: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """Ask for `samples` responses to `prompt`; sample j's random numbers are a function of (seed, j, position) only."""

    prompt: Prompt
    samples: int
    seed: int


class VersionSpan(NamedTuple):
    """Tokens [start, end) of a response were drawn from weights `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """One generated answer: token ids with the stop token, and one log-prob per token at the sampling temperature.

    `logprobs` are the engine's, before top-p, fp32 [tokens]. The policy's own, which ratio and KL use, are computed
    later and never stored here. `text` is the decoded response without special tokens; an engine without a tokenizer
    leaves it empty. `routed_experts` are the experts that the engine chose in every layer for every token that it read,
    the prompt's first: integers [prompt + response - 1, layers, experts per token]. Nothing was read behind the last
    token, so it has none.
    """

    tokens: tuple[int, ...]
    logprobs: FloatArray
    finish: Finish
    versions: tuple[VersionSpan, ...] = ()
    text: str = ""
    routed_experts: np.ndarray | None = None  # a mixture of experts, and an engine that tells

    @property
    def length(self) -> int:
        """Generated tokens, the stop token included."""
        return len(self.tokens)

    @property
    def truncated(self) -> bool:
        """True when the response did not end by itself: it is wrong, and enters no length statistic."""
        return self.finish != "stop"


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """One prompt and its n responses, as an engine gives them; a method sees whole groups only.

    From here a group goes through `Graded` and `Rewarded` to `Credited`: each stage holds the one before it.
    """

    prompt: Prompt
    responses: tuple[Response, ...]
    seed: int = 0  # the request's: it names this visit of the prompt

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

    correct, wrong: the verifier compared the answer with the gold. no_answer: the response has none where it is looked
    for (with last_box: no box, an empty one, or a last box that never closes). unparsed: the verifier cannot read the
    answer. timeout: the CPU limit. memory: the memory limit. crash: the verifier raised, or its process died or hung
    without using CPU. bad_gold: the verifier cannot read the gold. `answer` is what was found, `reason` what the
    verifier said; `partial` its score where it gave one, or the mean of several verifiers' scores by weight.
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
        """From 0 to 1: the verifiers' own, or 1 where the answer is correct."""
        return float(self.correct) if self.partial is None else self.partial


@dataclass(frozen=True, slots=True, eq=False)
class Graded:
    """A group and the verdicts on its responses, [n]."""

    group: Group
    grades: tuple[Grade, ...]

    @property
    def correct(self) -> BoolArray:
        """Right responses, bool [n]. One that was cut off is wrong."""
        return np.array([grade.correct for grade in self.grades], dtype=bool)

    @property
    def scores(self) -> FloatArray:
        """The verifiers' scores, 0 to 1, float64 [n]; 1 or 0 where they say yes or no."""
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
    """What a group's responses are trained on: the advantage of each, float64 [n].

    `masked`, bool [n], are those that are left out of the loss; None: none.
    """

    advantage: FloatArray
    masked: BoolArray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Credited:
    """A rewarded group and its credit: what is trained on, kept with the rollouts and replayed."""

    rewarded: Rewarded
    credit: Credit

    @property
    def graded(self) -> Graded:
        return self.rewarded.graded

    @property
    def group(self) -> Group:
        return self.rewarded.graded.group


class SequenceSize(NamedTuple):
    """A sequence's tokens: all that a rank has to know of those that others train on."""

    prompt: int
    response: int
    masked: bool = False  # left out of the loss

    @property
    def length(self) -> int:
        return self.prompt + self.response


@dataclass(frozen=True, slots=True)
class Sequence:
    """Prompt and response as one trainable row.

    `advantage` is the response's, `engine_logprobs` as sampled, `routed_experts` as in `Response`; `versions` say which
    weights drew its tokens, counted from the response's first.
    """

    tokens: list[int]
    prompt_length: int
    advantage: float = 0.0
    engine_logprobs: list[float] | None = None
    routed_experts: np.ndarray | None = None
    versions: tuple[VersionSpan, ...] = ()
    masked: bool = False  # known to rank 0 alone: others see it in the weights of an update

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def response_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def size(self) -> SequenceSize:
        return SequenceSize(self.prompt_length, self.response_length, self.masked)


@dataclass(slots=True)
class PackedBatch:
    """Several sequences laid end to end (THD): one micro-batch.

    `tokens`, `positions` are int64 [T]; sequence s stands at `cu_seqlens[s]:cu_seqlens[s + 1]` (int32) and is
    `lengths[s]` long, padding at its end included; a last sequence may be padding. Row r of `rows` [R] predicts
    response token `targets[r]`: everything per-token that the loss reads is [R], sequence by sequence, `row_lengths`
    each. `indices` says which sequences these are, padding left out. The loss is the sum of its terms times `weights`
    [R], which carry the mean over the whole update. What the loop fills in as it learns it: log-probs under the policy
    before its first update and under the initial model, advantages, importance weights, all fp32 [R]; and `live`, how
    many of the leading sequences hold every advantage that is not 0 (None: all may). `routed_experts` [T, layers,
    experts per token], on the host, are those that the routers are to choose; without them they choose for themselves.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    lengths: list[int]
    cu_seqlens: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    row_lengths: list[int]
    indices: list[int]
    weights: torch.Tensor
    old_logprobs: torch.Tensor | None = None
    reference_logprobs: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    importance: torch.Tensor | None = None  # None: 1 for all
    routed_experts: torch.Tensor | None = None
    live: int | None = None

    @property
    def live_rows(self) -> int:
        """The rows from here on have advantage 0."""
        return sum(self.row_lengths[: self.live])
