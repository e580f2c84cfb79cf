"""Models apart beyond the chance of training, against one that the sweep names."""

from __future__ import annotations

from typing import Any

from megatron_efr.errors import UserError
from megatron_efr.evaluation.comparison import Paired, differing, matched, paired
from megatron_efr.evaluation.figures import with_interval
from megatron_efr.evaluation.measures import named
from megatron_efr.evaluation.records import Record
from megatron_efr.report.differences import Interval, differences
from megatron_efr.report.records import label
from megatron_efr.report.results import Results
from megatron_efr.report.sentences import base_of, is_base

_WORDS = {
    "accuracy": {1: "more accurate", -1: "less accurate", 0: "not told apart"},
    "tokens": {1: "longer", -1: "briefer", 0: "not told apart"},
}


def build(results: Results) -> dict[str, Any] | str:
    """A row for each model: its differences from the reference, and what they say.

    Models of several seeds are compared by these; those of one run each problem by problem.
    """
    # models of two seeds or more; without two of them there is nothing to compare
    models = [
        model
        for model in results.models
        if len(model.get("accuracy_by_seed", ())) > 1 and not is_base(model)
    ]
    if len(models) < 2:
        return _of_one_run(results)
    by_name = {model["name"]: model for model in models}
    # against the sweep's reference, those that were asked alike
    reference = by_name.get(results.summary.get("against", ""), models[0])
    unlike = {model["name"]: label(model) for model in models if _unlike(results, reference, model)}
    models = [model for model in models if model["name"] not in unlike]
    if len(models) < 2:
        return f"No other model of several seeds was asked as {label(reference)} was."
    by_name = {model["name"]: model for model in models}
    # differences with simultaneous intervals
    comparisons = 2 * (len(models) - 1)
    found = {
        key: differences(
            {name: m[f"{key}_by_seed"] for name, m in by_name.items()},
            reference["name"],
            comparisons,
        )
        for key in _WORDS
    }
    rows = [
        [label(model), *(_cell(key, found[key][model["name"]]) for key in _WORDS)]
        for model in models
        if model is not reference
    ]
    # table and sentence
    brackets = (
        f"intervals that hold for all {comparisons} differences together in 95% of cases, from "
        "the spread over seeds, pooled over all models. They are of training's chance alone, on "
        "these problems."
    )
    sentence = _sentence(label(reference), found, brackets)
    if unlike:
        sentence += (
            f" Not among them, since they were asked otherwise: {', '.join(unlike.values())}."
        )
    return {"sentence": sentence, "rows": rows, "reference": label(reference)}


def _unlike(results: Results, one: Record, other: Record) -> bool:
    """True if the two were asked or judged otherwise, as far as their records say how."""
    records = [
        found
        for model in (one, other)
        if (found := results.record(model)) and found.get("protocol")
    ]
    return len(records) == 2 and bool(differing(*records))


def _of_one_run(results: Results) -> dict[str, Any] | str:
    """The same of each shown model's first run, against the base's or that of the model which the
    sweep names.
    """
    # the reference: the sweep's own, else the base
    named_one = [
        model for model in results.models if model["name"] == results.summary.get("against")
    ]
    base = named_one[0] if named_one else base_of(results.models)
    start = results.record(base) if base is not None else None
    if base is None or start is None:
        return "There is no base, and no family of several seeds, to compare models with."
    # differences over the problems that both were asked
    found: dict[str, dict[str, Interval]] = {key: {} for key in _WORDS}
    for model in results.shown:
        record = results.record(model)
        if model is base or record is None:
            continue
        for each in _paired(start, record):
            value, low, high = each.difference
            if value is not None and low is not None and high is not None:
                found[each.name][model["name"]] = Interval(value, low, high)
    # a row needs both accuracy and tokens
    kept = [model for model in results.shown if all(model["name"] in own for own in found.values())]
    if not kept:
        return (
            f"No other evaluation here can be compared with that of {label(base)}: they were asked "
            "otherwise, or other problems, or are an older version's."
        )
    # what these intervals leave out must stand beside them
    brackets = (
        "95% intervals of each difference for itself, paired over the problems. A model is one "
        "run here: training's chance is not in them."
    )
    rows = [
        [label(model), *(_cell(key, found[key][model["name"]]) for key in _WORDS)] for model in kept
    ]
    return {
        "sentence": _sentence(label(base), found, brackets),
        "rows": rows,
        "reference": label(base),
    }


def _paired(start: Record, record: Record) -> list[Paired]:
    """Differences on the problems of both; none if these were asked otherwise, or are others."""
    if differing(start, record):
        return []
    try:
        pair = matched(start, record)
    except UserError:
        return []
    return paired(*pair, [named(key) for key in _WORDS])


def _sentence(reference: str, found: dict[str, dict[str, Interval]], brackets: str) -> str:
    count = len(found["tokens"])
    briefer = sum(each.side < 0 for each in found["tokens"].values())
    longer = sum(each.side > 0 for each in found["tokens"].values())
    better = sum(each.side > 0 for each in found["accuracy"].values())
    worse = sum(each.side < 0 for each in found["accuracy"].values())
    return (
        f"Of {count} models, {briefer} are briefer than {reference} beyond chance and {longer} "
        f"longer; {better} are more accurate and {worse} less. In brackets: {brackets}"
    )


def _cell(key: str, found: Interval) -> str:
    scale, unit = (100, " points") if key == "accuracy" else (1, "")

    def write(value: float) -> str:
        return f"{scale * value:+.1f}".replace("-", "−")

    return (
        f"{with_interval(write(found.value) + unit, found.low, found.high, write)}: "
        f"{_WORDS[key][found.side]}"
    )
