"""The samples of an evaluation as one typed table: what every measure is a function of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_efr.evaluation.statistics import in_order
from megatron_efr.types import BoolArray, FloatArray, IntArray

NO_ANSWER = -1


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Columns over the problems [problems] and over all of their responses [samples], problem after
    problem.

    `problem` is the index of a sample's problem; `tokens` are drawn tokens; equal numbers in
    `answer` are equal answers of one problem, NO_ANSWER is none or cut off. `thinking`: the tokens
    up to the end of the thought. `reflections` counts reflection words, `repetition` is the share
    of runs of tokens that stood in the response before. `early` [samples, budgets] is the share of
    answers that were right when forced after so many tokens; `direct` the answers of each problem
    that were forced before any, numbered as `answer` is. `later` [samples] are the answers from the
    place at which each subthought begins, numbered likewise, and whether they are right. `limit`:
    no response could be longer. None: the record does not say.
    """

    ids: tuple[str, ...]
    datasets: tuple[str, ...]
    difficulties: tuple[str | None, ...]
    prompt_tokens: IntArray | None
    problem: IntArray
    correct: BoolArray
    tokens: IntArray
    truncated: BoolArray
    answered: BoolArray | None
    answer: IntArray | None
    thinking: IntArray | None
    reflections: IntArray | None
    repetition: FloatArray | None
    budgets: tuple[int, ...]
    early: FloatArray | None
    direct: tuple[tuple[int, ...], ...] | None
    later: tuple[tuple[tuple[int, bool], ...], ...] | None
    limit: int

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], limit: int | None = None) -> Samples:
        """The samples of a record's `rows`; `limit` is the one of its protocol, the longest
        response without one.
        """
        # rows hold lists of samples; here all samples stand in one array
        sizes = [len(row["correct"]) for row in rows]
        tokens = _column(rows, "tokens", np.int64)
        assert tokens is not None
        early = _early(rows)
        return cls(
            ids=tuple(row["id"] for row in rows),
            datasets=tuple(row["dataset"] for row in rows),
            difficulties=tuple(row["difficulty"] for row in rows),
            prompt_tokens=_numbers(rows, "prompt_tokens"),
            problem=np.repeat(np.arange(len(rows)), sizes),
            correct=np.concatenate([np.array(row["correct"], dtype=bool) for row in rows]),
            tokens=tokens,
            truncated=np.concatenate([np.array(row["truncated"], dtype=bool) for row in rows]),
            answered=_column(rows, "answered", np.bool_),
            answer=_column([_coded(row) for row in rows], "answers", np.int64),
            thinking=_column(rows, "thinking", np.int64),
            reflections=_column(rows, "reflections", np.int64),
            repetition=_column(rows, "repetition", np.float64),
            budgets=early[0] if early else (),
            early=early[1] if early else None,
            direct=_direct(rows),
            later=_later(rows),
            limit=limit or max(1, int(tokens.max())),
        )

    @property
    def sizes(self) -> IntArray:
        """Responses to each problem, [problems]."""
        return np.bincount(self.problem, minlength=len(self.ids))

    def total(self, values: np.ndarray) -> FloatArray:
        """Sums of `values` [samples] over each problem's, float64 [problems]."""
        sums = np.bincount(
            self.problem, weights=np.asarray(values, dtype=np.float64), minlength=len(self.ids)
        )
        return sums.astype(np.float64, copy=False)

    def mean(self, values: np.ndarray) -> FloatArray:
        """Means of `values` [samples] over each problem's, float64 [problems]."""
        return self.total(values) / self.sizes

    def by_dataset(self) -> dict[str, Samples]:
        """The samples of each data set, in their order."""
        return self._parts(self.datasets, dict.fromkeys(self.datasets))

    def by_difficulty(self) -> dict[str, Samples]:
        """The samples of each difficulty, easiest first; problems without one are left out."""
        return self._parts(
            self.difficulties, in_order({level for level in self.difficulties if level is not None})
        )

    def _parts(self, keys: Sequence[str | None], names: Iterable[str]) -> dict[str, Samples]:
        return {
            name: self.take([index for index, key in enumerate(keys) if key == name])
            for name in names
        }

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        """`values` [samples] by problem."""
        return np.split(values, np.cumsum(self.sizes)[:-1])

    def take(self, problems: Sequence[int]) -> Samples:
        """The samples of these problems, in this order."""
        # a problem's samples stand together: their places, in the new order
        sizes = self.sizes
        starts = np.cumsum(sizes) - sizes
        places = [np.arange(starts[index], starts[index] + sizes[index]) for index in problems]
        of = np.concatenate([*places, np.array([], dtype=np.int64)])

        def some(column: Any) -> Any:
            return None if column is None else column[of]

        return replace(
            self,
            # columns over problems, and the two of samples that are no plain arrays
            ids=tuple(self.ids[index] for index in problems),
            datasets=tuple(self.datasets[index] for index in problems),
            difficulties=tuple(self.difficulties[index] for index in problems),
            prompt_tokens=None
            if self.prompt_tokens is None
            else self.prompt_tokens[list(problems)],
            problem=np.repeat(np.arange(len(places)), [len(each) for each in places]),
            later=None if self.later is None else tuple(self.later[index] for index in of),
            direct=None if self.direct is None else tuple(self.direct[index] for index in problems),
            # columns over samples, as far as the record has them
            **{
                name: some(getattr(self, name))
                for name in ("correct", "tokens", "truncated", "answered", "answer")
            },
            **{
                name: some(getattr(self, name))
                for name in ("thinking", "reflections", "repetition", "early")
            },
        )


def _column(rows: Sequence[Mapping[str, Any]], key: str, dtype: Any) -> Any:
    """All samples' values in one array; None if a row lacks them."""
    found = [row.get(key) for row in rows]
    return (
        None
        if any(each is None for each in found)
        else np.concatenate([np.array(each, dtype) for each in found])
    )


def _numbers(rows: Sequence[Mapping[str, Any]], key: str) -> IntArray | None:
    found = [row.get(key) for row in rows]
    return None if any(each is None for each in found) else np.array(found, dtype=np.int64)


def _coded(row: Mapping[str, Any]) -> dict[str, list[int] | None]:
    answers = row.get("answers")
    return {
        "answers": None
        if answers is None
        else [NO_ANSWER if each is None else each for each in answers]
    }


def _early(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, ...], FloatArray] | None:
    found = [row["early"] for row in rows if row.get("early") is not None]
    if len(found) < len(rows) or len({tuple(each["at"]) for each in found}) != 1:
        return None
    return tuple(found[0]["at"]), np.concatenate(
        [np.array(each["right"], np.float64) for each in found]
    )


def _direct(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, ...], ...] | None:
    found = [row["direct"] for row in rows if row.get("direct") is not None]
    if len(found) < len(rows):
        return None
    return tuple(tuple(NO_ANSWER if code is None else code for code in each) for each in found)


def _later(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[tuple[int, bool], ...], ...] | None:
    found = [row["subthoughts"] for row in rows if row.get("subthoughts") is not None]
    if len(found) < len(rows):
        return None
    coded = [
        tuple(
            (NO_ANSWER if code is None else code, right)
            for code, right in zip(codes, rights, strict=True)
        )
        for each in found
        for codes, rights in zip(each["answers"], each["right"], strict=True)
    ]
    return tuple(coded)
