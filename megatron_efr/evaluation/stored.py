"""Reads evaluation records back; a file that is damaged, or another program's, is named with its
key.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from megatron_efr.errors import UserError

SCHEMA = 2
"""Of the records that are written: 1 had neither protocol nor measures, and less of each sample."""

Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class Part(BaseModel):
    """The keys of a file that are read; there may be more."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Measure(Part):
    value: float | None
    low: float | None
    high: float | None


class Figures(Part):
    problems: int
    samples: int
    accuracy: float
    accuracy_ci: Interval
    tokens: float
    tokens_ci: Interval
    tokens_right: float | None
    tokens_wrong: float | None
    tokens_by_difficulty: dict[str, float]
    accuracy_by_difficulty: dict[str, float]
    truncated: float
    pass_at_k: dict[str, float]
    majority: float | None
    tokens_per_right_answer: float | None
    measures: dict[str, _Measure] = {}


class _Early(Part):
    at: list[int]
    right: list[list[float]]

    @model_validator(mode="after")
    def _has_each_length(self) -> _Early:
        if any(len(shares) != len(self.at) for shares in self.right):
            raise ValueError("a list in `right` has another length than `at`")
        return self


class _Subthoughts(Part):
    answers: list[list[int | None]]
    right: list[list[bool]]

    @model_validator(mode="after")
    def _has_both_of_each(self) -> _Subthoughts:
        if [len(codes) for codes in self.answers] != [len(rights) for rights in self.right]:
            raise ValueError("`answers` and `right` are of different lengths")
        return self


class Row(Part):
    id: str
    dataset: str
    difficulty: str | None
    question: str
    gold: str
    correct: Annotated[list[bool], Field(min_length=1)]
    tokens: Annotated[list[int], Field(min_length=1)]
    truncated: Annotated[list[bool], Field(min_length=1)]
    responses: list[str]
    prompt_tokens: int | None = None
    answered: list[bool] | None = None
    answers: list[int | None] | None = None
    direct: list[int | None] | None = None
    early: _Early | None = None
    subthoughts: _Subthoughts | None = None
    thinking: list[int] | None = None
    reflections: list[int] | None = None
    repetition: list[float] | None = None

    @model_validator(mode="after")
    def _has_all_of_each_sample(self) -> Row:
        by_sample = (
            "tokens",
            "truncated",
            "answered",
            "answers",
            "thinking",
            "reflections",
            "repetition",
        )
        lengths = {
            len(found)
            for key in ("correct", *by_sample)
            if (found := getattr(self, key)) is not None
        }
        lengths |= {
            len(branched.right)
            for branched in (self.early, self.subthoughts)
            if branched is not None
        }
        if len(lengths) != 1:
            raise ValueError(
                "its lists are of different lengths, and each has an entry for every response"
            )
        return self


class _Protocol(Part):
    max_new_tokens: PositiveInt | None = None


class Evaluation(Figures):
    name: str
    schema_number: Annotated[int, Field(alias="schema", le=SCHEMA)] = 1
    protocol: _Protocol = _Protocol()
    datasets: dict[str, Figures]
    difficulties: dict[str, dict[str, _Measure]] = {}
    rows: Annotated[list[Row], Field(min_length=1)]


def read_evaluation(path: Path) -> dict[str, Any]:
    """An evaluation's record, as `records.summarise` made it; UserError if the file holds no such
    thing.
    """
    return read_tree(
        path, Evaluation, "evaluation record", "move it out of this folder, or evaluate again"
    )


def read_tree(path: Path, kind: type[BaseModel], what: str, advice: str) -> dict[str, Any]:
    """The JSON of a file that holds a `kind`; UserError, which calls it `what` and ends with
    `advice`, otherwise.
    """
    try:
        tree = json.loads(path.read_bytes())
        kind.model_validate(tree)
    except ValidationError as error:
        [problem, *_] = error.errors()
        where = ".".join(map(str, problem["loc"]))
        said = "an object belongs here" if problem["type"] == "model_type" else problem["msg"]
        raise UserError(
            f"{path}: no {what}: {where + ': ' if where else ''}{said}; {advice}"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # no JSON, or no text at all
        raise UserError(f"{path}: damaged, not JSON: {error}; {advice}") from error
    return tree
