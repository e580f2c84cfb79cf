"""Judged answers of a run, as rows to learn from: the shortest right one of each prompt, or it and
the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_efr.data.lengths import check_rows
from megatron_efr.data.readers import DatasetError
from megatron_efr.data.sft import ANSWERS
from megatron_efr.rollout.group_json import decode_graded
from megatron_efr.run.folder import read_groups
from megatron_efr.samples import Sample
from megatron_efr.types import Graded, Prompt, Response


def shortest(path: str, positions: int, limit: int | None = None) -> list[Sample]:
    """The shortest right answer of each prompt that has one: the paper's SFT baseline (arXiv
    2502.04463).
    """
    return _samples([(prompt, right[:1]) for prompt, right in _right(path)], path, positions, limit)


def every_right(path: str, positions: int, limit: int | None = None) -> list[Sample]:
    """Every right answer of each prompt, the shortest first."""
    return _samples(_right(path), path, positions, limit)


def pairs(path: str, positions: int, limit: int | None = None) -> list[Sample]:
    """The shortest right answer of each prompt and its longest right one, one behind the other.

    The paper's DPO baseline. A prompt whose right answers are all of one length makes no pair.
    """
    found = [
        (prompt, [right[0], right[-1]])
        for prompt, right in _right(path)
        if right[0].length < right[-1].length
    ]
    return _samples(found, path, positions, limit)


def _right(path: str) -> Iterator[tuple[Prompt, list[Response]]]:
    """Each prompt with its right answers, the shortest first, whatever visits they are of; prompts
    without are left out. Of equal lengths the one that was drawn first comes first.
    """
    right: dict[tuple[str, tuple[int, ...]], tuple[Prompt, list[Response]]] = {}
    for group in _groups(path):
        prompt = group.group.prompt
        judged = zip(group.group.responses, group.correct, strict=True)
        _, responses = right.setdefault((prompt.id, prompt.tokens), (prompt, []))
        responses.extend(response for response, correct in judged if correct)
    for prompt, responses in right.values():
        if responses:
            yield prompt, sorted(responses, key=lambda response: response.length)


def _groups(path: str) -> Iterator[Graded]:
    place = Path(path).expanduser()
    files = sorted(place.glob(f"*{ANSWERS}")) if place.is_dir() else [place]
    for file in files:
        if not file.is_file():
            raise DatasetError(
                f"{file}: no such file; a run keeps its answers in rollouts/ (observe.rollouts: "
                "true)"
            )
        yield from read_groups(file, decode_graded)


def _samples(
    found: Iterator[tuple[Prompt, list[Response]]] | Sequence[tuple[Prompt, list[Response]]],
    path: str,
    positions: int,
    limit: int | None,
) -> list[Sample]:
    """The answers behind their prompts, of the first `limit` prompts."""
    samples, places = [], []
    for prompt, responses in list(found)[:limit]:
        for response in responses:
            tokens = np.array([*prompt.tokens, *response.tokens], np.int32)
            samples.append(Sample(tokens, len(prompt.tokens)))
            places.append(f"{path}: prompt {prompt.id}")
    check_rows([sample.length for sample in samples], places, positions)
    return samples
