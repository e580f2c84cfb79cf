"""The question to a grading process, and its answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from megatron_efr.types import CORRECT as CORRECT

WRONG = "wrong"
NO_ANSWER = "no_answer"
UNPARSED = "unparsed"
TIMEOUT = "timeout"
MEMORY = "memory"
CRASH = "crash"
BAD_GOLD = "bad_gold"
STATUSES = (CORRECT, WRONG, NO_ANSWER, UNPARSED, TIMEOUT, MEMORY, CRASH, BAD_GOLD)
UNJUDGED = (TIMEOUT, MEMORY, CRASH, BAD_GOLD)
"""Statuses of answers about which nothing is known: the verifier did not come to a verdict."""


@dataclass(frozen=True, slots=True)
class Verifier:
    """A way to judge answers: its name, its options as JSON, and the score from which an answer is
    correct.
    """

    name: str = "math"
    options: str = "{}"
    threshold: float = 1.0

    @classmethod
    def of(
        cls, name: str, options: Mapping[str, Any] | None = None, threshold: float = 1.0
    ) -> Verifier:
        return cls(name, json.dumps(options or {}, sort_keys=True, default=str), threshold)


MATH = Verifier()


class Question(NamedTuple):
    """One thing to ask a verifier.

    verify: is `answer` right, if `gold` is? gold: can `gold` be judged against (`answer` is not
    read)? equal: are `gold` and `answer`, both answers, the same one?
    """

    verifier: Verifier
    gold: str
    answer: str
    kind: Literal["verify", "gold", "equal"] = "verify"


class Verdict(NamedTuple):
    """A grading process's answer: one of STATUSES, a score if the verifier gave one, and why."""

    status: str
    score: float | None = None
    reason: str = ""
