"""Sentences of the report, each computed from the figures, whichever way they fall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_efr.evaluation import statistics
from megatron_efr.evaluation.records import Record
from megatron_efr.report.records import base_name, label


def is_base(model: Mapping[str, Any]) -> bool:
    """True for a model that others begin with; in a summary of before, one without alpha."""
    return model["name"] == model["base"] if "base" in model else model["alpha"] is None


def base_of(models: Sequence[Record]) -> Record | None:
    """The first starting model of a family, or None if there is none to compare with."""
    first = models[0] if models else None
    return first if first is not None and is_base(first) and len(models) > 1 else None


def begun_with(base: Record, models: Sequence[Record]) -> list[Record]:
    """The models that begin with this base, which are asked what it is; it is none of them."""
    return [
        model for model in models if not is_base(model) and base_name(model, models) == base["name"]
    ]


def front(models: Sequence[Record]) -> list[Record]:
    """The Pareto front, briefest first: models than which no other is as brief and more accurate,
    or the reverse.
    """
    found: list[Record] = []
    for model in sorted(models, key=lambda one: (one["tokens"], -one["accuracy"])):
        if not found or model["accuracy"] > found[-1]["accuracy"]:
            found.append(model)
    return found


def headline(models: Sequence[Record], metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The result in a sentence: the briefest model that is no less accurate than the base, else the
    briefest at all.
    """
    base = base_of(models)
    if base is not None:
        bases = [model for model in models if is_base(model)]
        base = next((each for each in bases if begun_with(each, models)), base)
        return _against_base(base, begun_with(base, models))
    if models:
        model = min(models, key=lambda one: one["tokens"])
        return (
            f"{label(model)} is right {_accuracy(model)} of the time with {model['tokens']:.1f} "
            "tokens on average."
        )
    told = [sentence for name, lines in metrics.items() if (sentence := _training(name, lines))]
    return " ".join(told) or "Nothing has been measured yet."


def _against_base(base: Record, trained: Sequence[Record]) -> str:
    if not trained:
        return "Only starting models have been evaluated: there is no trained one to compare."
    as_right = [model for model in trained if model["accuracy"] >= base["accuracy"]]
    best = min(as_right or trained, key=lambda model: model["tokens"])
    share = best["tokens"] / base["tokens"] - 1
    saved = f"{abs(share):.0%} {'fewer' if share <= 0 else 'more'} tokens than the {label(base)}"
    verb = "is right" if as_right else "is less often right:"
    return (
        f"With {label(best)}, the model uses {saved} ({best['tokens']:.1f} against "
        f"{base['tokens']:.1f} on average) and {verb} {_accuracy(best)} of the time, against "
        f"{_accuracy(base)}."
    )


def _accuracy(model: Record) -> str:
    """A model's accuracy with its 95% interval, or its standard deviation over seeds, as far as it
    has one.
    """
    text = f"{model['accuracy']:.1%}"
    if model.get("accuracy_ci"):
        low, high = model["accuracy_ci"]
        return f"{text} (95% interval {low:.1%} to {high:.1%})"
    if model.get("accuracy_sd") is not None:
        return f"{text} (± {model['accuracy_sd']:.1%} over {len(model['accuracy_by_seed'])} seeds)"
    return text


def _training(name: str, lines: Sequence[Mapping[str, Any]]) -> str:
    # iterations whose rollouts were measured
    known = [
        line
        for line in lines
        if line.get("accuracy") is not None and line.get("tokens_mean") is not None
    ]
    if not known:
        return ""
    # one iteration has a level, and no course
    if len(known) == 1:
        [only] = known
        return (
            f"{name}: in the one iteration that there is, training accuracy was "
            f"{only['accuracy']:.1%} and mean tokens {only['tokens_mean']:.1f}."
        )
    # a tenth at either end, since one iteration's mean is noise
    tenth = max(1, len(known) // 10)
    (right, tokens), (right_now, tokens_now) = (
        (
            np.mean([line["accuracy"] for line in part]),
            np.mean([line["tokens_mean"] for line in part]),
        )
        for part in (known[:tenth], known[-tenth:])
    )
    return (
        f"{name}: over {known[-1]['step']} iterations, training accuracy went from {right:.1%} to "
        f"{right_now:.1%} and mean tokens from {tokens:.1f} to {tokens_now:.1f} (first and last "
        "tenth)."
    )


class Halves(NamedTuple):
    """The difficulties that count as easy and as hard; with an odd number of them the middle one is
    neither.
    """

    easy: list[str]
    hard: list[str]
    ordered_by: str


def halves(base: Record) -> Halves | None:
    """Split the base's difficulties in two; None if there are fewer than two."""
    tokens = base["tokens_by_difficulty"]
    levels = statistics.in_order(tokens)
    if len(levels) < 2:
        return None
    numbered = all(any(character.isdigit() for character in level) for level in levels)
    if not numbered:  # words have no order of their own
        levels = sorted(levels, key=lambda level: tokens[level])
    half = len(levels) // 2
    return Halves(
        levels[:half], levels[-half:], "" if numbered else " (ordered by the base's tokens)"
    )


def difficulty_sentences(models: Sequence[Record], evaluations: Mapping[str, Record]) -> list[str]:
    """Sentences on shrinking by difficulty: a summing-up, then one for each model; [] if unknown.

    A difference is called one only if its 95% interval (bootstrap over problems, both models'
    tokens together) leaves out zero.
    """
    # problems split by the base's difficulties
    base = base_of(models)
    split = halves(base) if base is not None else None
    if base is None or split is None or base["name"] not in evaluations:
        return []
    # each model's share of the base's tokens on both halves
    sides: list[int] = []
    sentences: list[str] = []
    for model in begun_with(base, models):
        records = evaluations.get(model["name"]), evaluations[base["name"]]
        on_easy, on_hard = _pairs(*records, split.easy), _pairs(*records, split.hard)
        if not len(on_easy) or not len(on_hard):
            continue
        easy, hard, (low, high) = statistics.ratio_of_tokens(on_easy, on_hard)
        # apart only if the interval leaves out zero
        side = -1 if high < 0 else 1 if low > 0 else 0
        sides.append(side)
        verdict = {
            -1: "relatively fewer on easy problems",
            1: "relatively fewer on hard problems",
            0: "no difference beyond chance",
        }[side]
        sentences.append(
            f"{label(model)} uses {easy:.0%} of the {label(base)}'s tokens on easy problems and "
            f"{hard:.0%} on hard ones: {verdict} (difference {_points(easy - hard)}, 95% interval "
            f"{_points(low)} to {_points(high)})."
        )
    where = (
        f"Easy means difficulty {', '.join(split.easy)}; hard, "
        f"{', '.join(split.hard)}{split.ordered_by}."
    )
    return [f"{_overall(sides)} {where}", *sentences] if sentences else []


def _pairs(record: Record | None, base: Record, levels: Sequence[str]) -> np.ndarray:
    """Mean tokens (model, base) of every problem of these difficulties that both answered,
    [problems, 2].
    """
    rows = {} if record is None else {row["id"]: row for row in record["rows"]}
    both = [
        (rows[row["id"]], row)
        for row in base["rows"]
        if row["difficulty"] in levels and row["id"] in rows
    ]
    return np.array(
        [[np.mean(row["tokens"]) for row in pair] for pair in both], dtype=float
    ).reshape(-1, 2)


def _overall(sides: Sequence[int]) -> str:
    if all(side == -1 for side in sides):
        return (
            "Compute follows difficulty: relative to the base, easy problems take fewer tokens "
            "than hard ones."
        )
    if all(side == 1 for side in sides):
        return (
            "Relative to the base, hard problems take fewer tokens than easy ones: not what the "
            "paper saw."
        )
    if all(side == 0 for side in sides):
        return (
            "Relative to the base, easy and hard problems take alike many tokens, as far as can "
            "be told."
        )
    return "How tokens relative to the base depend on difficulty differs between the models."


def _points(value: float) -> str:
    return f"{100 * value:+.1f} points".replace("-", "−")


class Chosen(NamedTuple):
    """One problem and the rule that chose it; `rows` holds each model's row of it, in the models'
    order.
    """

    rule: str
    rows: dict[str, Record]


def chosen_problems(names: Sequence[str], evaluations: Mapping[str, Record]) -> list[Chosen]:
    """Problems to show answered by every model: chosen by rule from the first model's evaluation,
    never by hand.

    Of median difficulty, then of the lowest and the highest one, the first problem that the first
    model gets right in its first sample. Without difficulties, or if it gets none of the median
    right, the first one that it gets right at all; failing that, the first problem. Empty if no
    problem was answered by all.
    """
    tables = {
        name: {row["id"]: row for row in evaluations[name]["rows"]}
        for name in names
        if name in evaluations
    }
    if not tables:
        return []
    who = next(iter(tables))
    first, *others = tables.values()
    shared = [row for id, row in first.items() if all(id in table for table in others)]
    if not shared:
        return []
    picked = _picked(shared, who)
    return [
        Chosen(rule, {name: table[row["id"]] for name, table in tables.items()})
        for row, rule in picked
    ]


def _picked(shared: Sequence[Record], who: str) -> list[tuple[Record, str]]:
    """(row, rule) of each problem that is shown."""
    right = [row for row in shared if row["correct"][0]]
    # the lowest, the median and the highest difficulty; the median is over problems
    levels = statistics.in_order(
        {row["difficulty"] for row in shared if row["difficulty"] is not None}
    )
    by_level = [
        row["difficulty"] for level in levels for row in shared if row["difficulty"] == level
    ]
    median = by_level[(len(by_level) - 1) // 2] if by_level else None
    named = {f"median difficulty ({median})": median}
    if levels:
        named |= {
            f"the lowest difficulty ({levels[0]})": levels[0],
            f"the highest ({levels[-1]})": levels[-1],
        }
    # of each the first that is right; two levels may be one
    found: dict[str, tuple[Record, str]] = {}
    for text, level in named.items():
        row = next((row for row in right if level is not None and row["difficulty"] == level), None)
        if row is not None:
            found.setdefault(
                row["id"], (row, f"the first problem of {text} that {who} gets right at first try")
            )
    # no levels, or none right there: the first right one, else the first
    if found:
        return list(found.values())
    if right:
        return [(right[0], f"the first problem that {who} gets right at first try")]
    return [(shared[0], f"the first problem ({who} gets none right at first try)")]
