"""An evaluation's record: graded groups in, JSON-ready figures out; read again from its file."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_efr.evaluation import statistics
from megatron_efr.types import Graded

_SHOWN_CHARACTERS = 6000  # of a sample response: enough to read, and a record of 32k-token answers stays small

Record = dict[str, Any]
Answers = Sequence[Sequence[Hashable | None]]
"""For each problem the key of each response's answer."""


def summarise(
    groups: Sequence[Graded],
    name: str,
    *,
    answers: Answers | None = None,
    left_out: Mapping[str, int] | None = None,
    seed: int = 0,
    shown: int = 2,
) -> Record:
    """The evaluation record of one model: figures of all problems, of each dataset, and a row per problem.

    `groups` are one per problem; dataset and difficulty come from `prompt.meta`, the question
    as people read it from `prompt.meta["question"]` or else `prompt.text`. `answers` [problems][samples] are keys under
    which equal answers are equal (None: no answer); without them there is no majority vote. `left_out` counts problems
    of each data set that were not asked, since their prompts are too long. `seed` draws the bootstrap; the text of the
    first `shown` responses of each problem is kept. ValueError where nothing was evaluated.
    """
    if not groups:
        raise ValueError(f"evaluation {name}: no problems to summarise")
    if answers is not None and len(answers) != len(groups):
        raise ValueError(f"evaluation {name}: answers to {len(answers)} problems, and {len(groups)} problems")
    parts: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        parts.setdefault(str(group.group.prompt.meta.get("dataset", "held-out")), []).append(index)
    return {
        "name": name,
        "left_out": dict(left_out or {}),
        **_figures(groups, answers, seed),
        "datasets": {
            dataset: _figures([groups[i] for i in rows], None if answers is None else [answers[i] for i in rows], seed)
            for dataset, rows in parts.items()
        },
        "rows": [_row(group, shown) for group in groups],
    }


def _figures(groups: Sequence[Graded], answers: Answers | None, seed: int) -> Record:
    rates, lengths = statistics.pass_rates(groups), statistics.mean_lengths(groups)
    accuracy, tokens = float(np.mean(rates)), float(np.mean(lengths))
    right, wrong = statistics.tokens_by_correctness(groups)
    fewest = min(len(group.grades) for group in groups)
    ks = [2**power for power in range(fewest.bit_length())]
    cost = statistics.cost_of_pass(tokens, accuracy)
    samples = sum(len(group.grades) for group in groups)
    return {
        "problems": len(groups),
        "samples": samples,
        "accuracy": accuracy,
        "accuracy_ci": list(statistics.rate_interval(rates, samples)),
        "tokens": tokens,
        "tokens_ci": list(statistics.interval(lengths, seed)),
        "tokens_right": right,
        "tokens_wrong": wrong,
        "tokens_by_difficulty": statistics.by_difficulty(groups, statistics.mean_lengths),
        "accuracy_by_difficulty": statistics.by_difficulty(groups, statistics.pass_rates),
        "truncated": statistics.truncation_rate(groups),
        "pass_at_k": {
            str(k): float(np.mean([statistics.pass_at_k(len(g.grades), int(g.correct.sum()), k) for g in groups]))
            for k in ks
        },
        **_votes(groups, answers),
        "tokens_per_right_answer": cost if np.isfinite(cost) else None,
    }


def _votes(groups: Sequence[Graded], answers: Answers | None) -> Record:
    """Accuracy of the votes over each problem's responses; None where nobody said which answers are equal."""
    if answers is None:
        return {"majority": None, "shortest_majority": None}
    cast = [(own, graded.correct, graded.group.lengths) for own, graded in zip(answers, groups, strict=True)]
    return {
        "majority": float(np.mean([statistics.majority(own, right) for own, right, _ in cast])),
        "shortest_majority": float(np.mean([statistics.shortest_majority(*each) for each in cast])),
    }


def _row(graded: Graded, shown: int) -> Record:
    group, meta = graded.group, graded.group.prompt.meta
    difficulty = meta.get("difficulty")
    return {
        "id": group.prompt.id,
        "dataset": str(meta.get("dataset", "held-out")),
        "difficulty": None if difficulty is None else str(difficulty),
        "question": str(meta.get("question", group.prompt.text)),
        "gold": group.prompt.gold,
        "correct": [bool(value) for value in graded.correct],
        "tokens": [response.length for response in group.responses],
        "truncated": [response.truncated for response in group.responses],
        "responses": [_clip(response.text) for response in group.responses[:shown]],
    }


def _clip(text: str) -> str:
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    half = _SHOWN_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def describe(record: Record) -> str:
    """The figures of every data set, a line each."""
    lines = [f"{record['name']}:"]
    for dataset, figures in record["datasets"].items():
        low, high = figures["accuracy_ci"]
        lines.append(
            f"  {dataset}: accuracy {figures['accuracy']:.1%} [{low:.1%}, {high:.1%}], "
            f"{figures['tokens']:.1f} tokens, {figures['truncated']:.1%} cut off, "
            f"{figures['samples']} responses to {figures['problems']} problems"
        )
    return "\n".join([*lines, *filter(None, [left_out_note(record["left_out"])])])


def left_out_note(left_out: Mapping[str, int]) -> str:
    """A sentence on the problems that were not asked; empty where all were."""
    if not left_out:
        return ""
    total = sum(left_out.values())
    where = ", ".join(f"{count:,} of {name}" for name, count in left_out.items())
    return (
        f"Left out, since the prompt is longer than prompt.max_tokens: {total:,} problem{'s' * (total > 1)}, {where}."
    )
