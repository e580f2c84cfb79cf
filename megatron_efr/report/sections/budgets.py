"""Accuracy if a response that is longer than a budget counts as wrong."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron_efr.evaluation.figures import with_interval
from megatron_efr.report import plots
from megatron_efr.report.differences import Interval
from megatron_efr.report.records import label
from megatron_efr.report.results import Results

_PREFIX = "accuracy_within@"
_SIZE = (5.2, 3.4)  # inches


def build(results: Results) -> dict[str, Any] | str:
    """A line for each model over the budgets that all records have, and the table."""
    # budgets that every record has; the limit is one of them
    records = [record for model in results.models for record in results.records(model)]
    measured = [
        {n for n in record.get("measures", {}) if n.startswith(_PREFIX)} for record in records
    ]
    shared = set.intersection(*measured) if measured else set[str]()
    names = {int(name.removeprefix(_PREFIX)): name for name in shared}
    limits = {record.get("protocol", {}).get("max_new_tokens") for record in records}
    if len(limits) == 1 and None not in limits:
        names[limits.pop()] = "accuracy"
    if len(names) < 2:
        return "The evaluations here have no figures at hard budgets in common."
    # a line for each model that is shown
    budgets = sorted(names)
    found = {
        m["name"]: [results.measure(m, names[budget]) for budget in budgets] for m in results.models
    }
    lines = [
        _line(
            results.hues[m["name"]],
            budgets,
            [each for each in found[m["name"]] if each is not None],
        )
        for m in results.shown
        if all(each is not None for each in found[m["name"]])
    ]
    # the plot, and the table that says the same
    draw = partial(
        plots.draw_lines, lines=lines, x="budget (tokens)", y="accuracy (%)", from_zero=True
    )
    key = results.key(results.shown)
    alt = "Accuracy at each budget, the figures are in the table below"
    return {
        "plots": results.draw("budgets", [("", draw)], _SIZE, alt, key=results.coloured(key)),
        "key": key,
        "choice": results.choice,
        "budgets": budgets,
        # models without a line have their figures here
        "rows": [
            [label(m), *(_written(each) for each in found[m["name"]])] for m in results.models
        ],
    }


def _line(hue: str, budgets: list[int], values: list[Interval]) -> plots.Line:
    known = all(each.low is not None and each.high is not None for each in values)
    low = [100 * each.low for each in values if each.low is not None] if known else []
    high = [100 * each.high for each in values if each.high is not None] if known else []
    return plots.Line(hue, budgets, [100 * each.value for each in values], low, high)


def _written(value: Interval | None) -> str:
    if value is None:
        return "–"
    return with_interval(
        f"{value.value:.1%}", value.low, value.high, lambda end: f"{100 * end:.1f}"
    )
