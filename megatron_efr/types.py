"""What the rooms hand to each other: prompts, requests, responses, groups, grades and packed batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from megatron_efr.errors import UserError as UserError

Finish = Literal["stop", "length", "abort"]
T = TypeVar("T", covariant=True)


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


@dataclass(slots=True)
class Response:
    """One generated answer: token ids with the stop token, and one log-prob per token at the sampling temperature.

    `logprobs` are the engine's, before top-p. The policy's own, which ratio and KL use, are computed later and never
    stored here. `text` is the decoded response without special tokens. `routed_experts` are the experts that the
    engine chose in every layer for every token that it read, the prompt's first: integers [prompt + response - 1,
    layers, experts per token]. Nothing was read behind the last token, so it has none.
    """

    tokens: list[int]
    logprobs: list[float]
    finish: Finish
    versions: list[VersionSpan] = field(default_factory=list)
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


@dataclass(slots=True)
class Group:
    """One prompt and its n responses; a method sees whole groups only. Arrays are [n], filled in loop order."""

    prompt: Prompt
    responses: list[Response]
    seed: int = 0  # the request's: it names this visit of the prompt
    correct: np.ndarray | None = None  # bool
    statuses: list[str] = field(default_factory=list)  # the grader's word for each response
    scores: np.ndarray | None = (
        None  # float64, 0 to 1: the verifiers' scores by weight; 1 or 0 where one says yes or no
    )
    rewards: np.ndarray | None = None  # float64
    advantages: np.ndarray | None = None  # float64
    masked: np.ndarray | None = None  # bool: responses that are left out of the loss (None: none)

    @property
    def masks(self) -> np.ndarray:
        """Responses that are left out of the loss, bool [n]."""
        return np.zeros(len(self.responses), dtype=bool) if self.masked is None else self.masked

    @property
    def lengths(self) -> np.ndarray:
        """Generated tokens per response, int64 [n]."""
        return np.array([r.length for r in self.responses], dtype=np.int64)

    @property
    def truncated(self) -> np.ndarray:
        """Responses that hit the token limit, bool [n]."""
        return np.array([r.truncated for r in self.responses], dtype=bool)


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
