"""Groups for tests, at the stage that a test starts from, up to samples with the columns that it
wants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_efr.methods import Known, Sampled
from megatron_efr.samples import COLUMNS, Sample
from megatron_efr.types import (
    Credit,
    Credited,
    Finish,
    Grade,
    Graded,
    Group,
    Marks,
    Prompt,
    Response,
    Rewarded,
)

KNOWN = Known(
    step=1,
    limit=40_000,
    state={},
    history={},
    reference={"p": Sampled((400, 600), (True, False))},
    marks=Marks("<think>", "</think>"),
)
"""Knowledge of a method in its first iteration; the starting model gets the prompt half right."""


def response(
    length: int, finish: Finish = "stop", text: str = "", logprob: float = 0.0
) -> Response:
    """A response of so many equal tokens."""
    return Response((1,) * length, np.full(length, logprob, dtype=np.float32), finish, text=text)


def graded(
    correct: Sequence[Any],
    lengths: Sequence[int],
    finish: Sequence[Finish] | None = None,
    *,
    text: str = "",
    prompt: Prompt | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Graded:
    """Responses of these lengths, right if `correct` is true."""
    ends = finish or ["stop"] * len(lengths)
    responses = tuple(response(n, end, text) for n, end in zip(lengths, ends, strict=True))
    group = Group(prompt or Prompt("p", (1,), "q", "1", meta or {}), responses)
    return Graded(group, tuple(Grade("correct" if right else "wrong") for right in correct))


def credited(
    group: Group | Graded, advantage: Sequence[float] | np.ndarray, rewards: Any = None
) -> Credited:
    """The last stage; all wrong and without reward if nothing else is given."""
    if isinstance(group, Group):
        group = Graded(group, (Grade("wrong"),) * len(group.responses))
    values = (
        np.zeros(len(group.grades)) if rewards is None else np.asarray(rewards, dtype=np.float64)
    )
    return Credited(Rewarded(group, values), Credit(np.asarray(advantage, dtype=np.float64)))


def sample(tokens: Sequence[int], prompt_length: int, **columns: Any) -> Sample:
    """A sample with these columns: one number for all of its response's tokens, or one for each."""
    return with_columns(Sample(np.array(tokens, dtype=np.int32), prompt_length), **columns)


def with_columns(of: Sample, **columns: Any) -> Sample:
    """The sample with these columns besides."""
    made = {
        name: np.broadcast_to(np.asarray(values, COLUMNS[name].dtype), of.response_length).copy()
        for name, values in columns.items()
    }
    return replace(of, columns={**of.columns, **made})
