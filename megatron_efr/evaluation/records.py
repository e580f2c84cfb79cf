"""An evaluation's record: graded groups in, JSON-ready rows and figures out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from megatron_efr.evaluation.figures import Figure, measured, with_interval
from megatron_efr.evaluation.responses import reflections, repetition
from megatron_efr.evaluation.samples import Samples
from megatron_efr.evaluation.stored import SCHEMA
from megatron_efr.types import Graded, Response

# of a sample response: enough to read, and a record of 32k-token answers stays small
_SHOWN_CHARACTERS = 6000
_FLAT = (
    "accuracy",
    "tokens",
    "tokens_right",
    "tokens_wrong",
    "truncated",
    "majority",
    "shortest_majority",
)

_UNANSWERED = ("truncated", "no_answer")

Record = dict[str, Any]
Answers = Sequence[Sequence[Hashable | None]]
"""For each problem the key of each response's answer."""


class Early(NamedTuple):
    """Answers that were forced at each of the lengths `at`, by problem.

    `right` [problems][samples][lengths] is the share of them that is right; if the thought had
    ended before, the response's own verdict. `direct` [problems] has keys, as answers do, of those
    that were forced before any thought; empty: nothing was.
    """

    at: tuple[int, ...]
    right: list[list[list[float]]]
    direct: Answers


class Subthoughts(NamedTuple):
    """The answers from each subthought's beginning, [problems][samples][subthoughts]: their keys,
    as answers have them, and whether they are right.
    """

    answers: Sequence[Answers]
    right: list[list[list[bool]]]


def summarise(
    groups: Sequence[Graded],
    name: str,
    *,
    answers: Answers | None = None,
    early: Early | None = None,
    subthoughts: Subthoughts | None = None,
    thinking: Callable[[Response], int | None] | None = None,
    protocol: Mapping[str, Any] | None = None,
    left_out: Mapping[str, int] | None = None,
    seed: int = 0,
    shown: int = 2,
) -> Record:
    """The evaluation record of one model: figures of all problems, of each dataset, and a row per
    problem.

    `groups` are one per problem; dataset and difficulty come from `prompt.meta`, the question as
    people read it from `prompt.meta["question"]` or else `prompt.text`. `answers`
    [problems][samples] are keys under which equal answers are equal (None: no answer); without them
    there is no majority vote. `thinking` counts the tokens of a response's thought, None if it does
    not end one. `protocol` says how the problems were asked and judged. `left_out` counts problems
    of each data set that were not asked, since their prompts are too long. `seed` draws the
    bootstrap; the text of the first `shown` responses of each problem is kept. ValueError if
    nothing was evaluated.
    """
    # a mean of nothing, or votes of other problems
    if not groups:
        raise ValueError(f"evaluation {name}: no problems to summarise")
    if answers is not None and len(answers) != len(groups):
        raise ValueError(
            f"evaluation {name}: answers to {len(answers)} problems, and {len(groups)} problems"
        )
    # a row for each problem
    rows = [_row(group, shown) for group in groups]
    _add_answers(rows, answers, early, subthoughts)
    _add_thoughts(rows, groups, thinking)
    # figures over all rows, by data set and by difficulty
    samples = Samples.of(rows, (protocol or {}).get("max_new_tokens"))
    figures = _figures(samples, seed)
    datasets = samples.by_dataset()
    return {
        "schema": SCHEMA,
        "name": name,
        "protocol": dict(protocol or {}),
        "left_out": dict(left_out or {}),
        **figures,
        "datasets": {
            dataset: figures if len(datasets) == 1 else _figures(part, seed)
            for dataset, part in datasets.items()
        },
        "difficulties": {
            level: _measures(measured(part, seed=seed))
            for level, part in samples.by_difficulty().items()
        },
        "rows": rows,
    }


def samples_of(record: Mapping[str, Any]) -> Samples:
    """The samples of a record, also of one that was read from its file."""
    return Samples.of(record["rows"], record.get("protocol", {}).get("max_new_tokens"))


def _figures(samples: Samples, seed: int) -> Record:
    """The figures that reports read by their own keys, and all measures."""
    found = measured(samples, seed=seed)
    levels = samples.by_difficulty()
    return {
        "problems": len(samples.ids),
        "samples": len(samples.tokens),
        **{key: found[key].value if key in found else None for key in _FLAT},
        "accuracy_ci": list(found["accuracy"][1:]),
        "tokens_ci": list(found["tokens"][1:]),
        "tokens_by_difficulty": {
            level: float(part.mean(part.tokens).mean()) for level, part in levels.items()
        },
        "accuracy_by_difficulty": {
            level: float(part.mean(part.correct).mean()) for level, part in levels.items()
        },
        "pass_at_k": {
            name.removeprefix("pass@"): found[name].value
            for name in found
            if name.startswith("pass@")
        },
        "tokens_per_right_answer": found["tokens_per_right_answer"].value,
        "measures": _measures(found),
    }


def _measures(found: Mapping[str, Figure]) -> Record:
    return {name: figure._asdict() for name, figure in found.items()}


def _row(graded: Graded, shown: int) -> Record:
    """Keep of a problem its text, a list with an entry for each sample by key, the first responses'
    texts.
    """
    group, meta = graded.group, graded.group.prompt.meta
    difficulty = meta.get("difficulty")
    return {
        "id": group.prompt.id,
        "dataset": str(meta.get("dataset", "held-out")),
        "difficulty": None if difficulty is None else str(difficulty),
        "question": str(meta.get("question", group.prompt.text)),
        "gold": group.prompt.gold,
        "prompt_tokens": len(group.prompt.tokens),
        "correct": [bool(value) for value in graded.correct],
        "tokens": [response.length for response in group.responses],
        "truncated": [response.truncated for response in group.responses],
        "answered": [grade.status not in _UNANSWERED for grade in graded.grades],
        "reflections": [reflections(response.text) for response in group.responses],
        "repetition": [repetition(response.tokens) for response in group.responses],
        "responses": [_clip(response.text) for response in group.responses[:shown]],
    }


def _add_answers(
    rows: Sequence[Record],
    answers: Answers | None,
    early: Early | None,
    subthoughts: Subthoughts | None,
) -> None:
    """Number each problem's answers, and those of what was tried beside them."""
    for index, row in enumerate(rows):
        direct = early.direct[index] if early and early.direct else []
        later = subthoughts.answers[index] if subthoughts else []
        keys = dict.fromkeys(
            [*(answers[index] if answers else []), *direct, *chain.from_iterable(later)]
        )
        numbers: dict[Hashable | None, int | None] = {key: code for code, key in enumerate(keys)}
        numbers[None] = None
        if answers is not None:
            row["answers"] = [numbers[key] for key in answers[index]]
        if early:
            row["early"] = {"at": list(early.at), "right": early.right[index]}
        if direct:
            row["direct"] = [numbers[key] for key in direct]
        if subthoughts:
            codes = [[numbers[key] for key in own] for own in later]
            row["subthoughts"] = {"answers": codes, "right": subthoughts.right[index]}


def _add_thoughts(
    rows: Sequence[Record],
    groups: Sequence[Graded],
    thinking: Callable[[Response], int | None] | None,
) -> None:
    """Add the tokens of each thought if any response ends one; one that ends none is all
    thought.
    """
    if thinking is None:
        return
    found = [[thinking(response) for response in graded.group.responses] for graded in groups]
    if all(count is None for counts in found for count in counts):
        return
    for row, counts in zip(rows, found, strict=True):
        row["thinking"] = [
            whole if own is None else own for own, whole in zip(counts, row["tokens"], strict=True)
        ]


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
        accuracy = with_interval(f"{figures['accuracy']:.1%}", low, high, "{:.1%}".format)
        lines.append(
            f"  {dataset}: accuracy {accuracy}, "
            f"{figures['tokens']:.1f} tokens, {figures['truncated']:.1%} cut off, "
            f"{figures['samples']} responses to {figures['problems']} problems"
        )
    return "\n".join([*lines, *filter(None, [left_out_note(record["left_out"])])])


def left_out_note(left_out: Mapping[str, int]) -> str:
    """A sentence on the problems that were not asked; empty if all were."""
    if not left_out:
        return ""
    total = sum(left_out.values())
    where = ", ".join(f"{count:,} of {name}" for name, count in left_out.items())
    return (
        f"Left out, since the prompt is longer than prompt.max_tokens: {total:,} "
        f"problem{'s' * (total > 1)}, {where}."
    )
