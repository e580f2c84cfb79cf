"""The family: the front of accuracy against tokens, the table of all models, and each data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from megatron_efr.errors import UserError
from megatron_efr.evaluation import statistics
from megatron_efr.evaluation.figures import with_interval
from megatron_efr.evaluation.measures import named
from megatron_efr.evaluation.records import Record
from megatron_efr.report import plots
from megatron_efr.report.differences import Interval
from megatron_efr.report.records import FIGURES, base_name, figure, label, relative, spread_note
from megatron_efr.report.results import Results
from megatron_efr.report.sentences import front, is_base

_SIZE = (5.2, 3.7)  # inches
_LARGE = (6.4, 5.0)
_MOST_NAMES = 10  # that a plot has room for; points of larger families are numbered
_VOTES = ("majority", "shortest_majority")


def build(results: Results) -> dict[str, Any] | str:
    """The plot of all models, its front in words, the tables."""
    models = results.models
    if not models:
        return "No evaluation on held-out problems is in this folder yet: `efr evaluate` makes one."
    # many names would cover the plot: numbers there, names in the table
    numbered = len(models) > _MOST_NAMES
    texts = {
        m["name"]: str(number) if numbered else label(m) for number, m in enumerate(models, start=1)
    }
    points = {
        m["name"]: plots.Point.of(m, texts[m["name"]], results.hues[m["name"]]) for m in models
    }
    # the front: nobody else is both shorter and more accurate
    best = front(models)
    draw = partial(
        plots.draw_family, points=list(points.values()), front=[points[m["name"]] for m in best]
    )
    # the plot in words, for those who cannot see it
    told = "; ".join(f"{label(m)} {m['accuracy']:.1%} at {m['tokens']:.1f} tokens" for m in models)
    alt = f"Accuracy against mean tokens: {told}"
    [(_, plot)] = results.draw("family", [("", draw)], _LARGE if numbered else _SIZE, alt)
    # the tables, and what they rest on
    rows = _rows(results)
    return {
        "plot": plot,
        "front": _front(best) if len(models) > 1 else "",
        "numbered": numbered,
        "rows": rows,
        "more": list(dict.fromkeys(name for row in rows for name in row["more"])),
        "spread": spread_note(results.summary),
        "measures": _measures(results),
        "datasets": _datasets(results),
    }


def _front(best: list[Record]) -> str:
    names = ", ".join(label(model) for model in best)
    return (
        f"The line is the front: {names}. To each of them no other model is both at least as "
        "accurate and at least as brief. What lies within the bars may be chance."
    )


def _rows(results: Results) -> list[dict[str, Any]]:
    """A row per model: the family's figures, and under `more` whatever its evaluations' records
    add.
    """
    by_name = {model["name"]: model for model in results.models}
    best = {model["name"] for model in front(results.models)}
    rows: list[dict[str, Any]] = []
    for number, model in enumerate(results.models, start=1):
        base = by_name.get(base_name(model, results.models))
        against = base if base is not None and base is not model else None
        rows.append(
            {
                "number": number,
                "name": model["name"],
                "label": label(model),
                "on_front": model["name"] in best and len(by_name) > 1,
                "accuracy": _split(figure(model, "accuracy", lambda v: f"{100 * v:.1f}", "%")),
                "tokens": _split(figure(model, "tokens", lambda v: f"{v:.1f}")),
                "against": "" if against is None else relative(model["tokens"], against["tokens"]),
                "more": _more(results.records(model)) | _score(model, against),
            }
        )
    return rows


def _score(model: Record, base: Record | None) -> dict[str, str]:
    if base is None or not base["accuracy"] > 0:
        return {}
    figures = (model["accuracy"], model["tokens"], base["accuracy"], base["tokens"])
    return {"AES": f"{statistics.accuracy_efficiency_score(*figures):+.2f}".replace("-", "−")}


def _split(text: str) -> tuple[str, str]:
    """The figure and its spread, which takes a line of its own on a phone."""
    value, _, spread = text.partition(" ")
    return value, spread


def _more(records: list[Record]) -> dict[str, str]:
    """Further figures, each the mean over a model's runs; a dash if one of them lacks it."""
    if not records:
        return {}
    cells = {
        "tokens when right": _number(_mean(records, "tokens_right")),
        "when wrong": _number(_mean(records, "tokens_wrong")),
        "per right answer": _number(_mean(records, "tokens_per_right_answer")),
        "truncated": f"{fmean(record['truncated'] for record in records):.1%}",
    }
    drawn = [record["pass_at_k"] for record in records]
    rates = {f"pass@{k}": _mean(drawn, k) for k in drawn[0] if k != "1"}
    rates |= {key.replace("_", " "): _mean(records, key) for key in _VOTES}
    return cells | {name: f"{rate:.1%}" for name, rate in rates.items() if rate is not None}


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The mean of a figure over records; None if one of them lacks it."""
    values = [record[key] for record in records if record.get(key) is not None]
    return fmean(values) if len(values) == len(records) else None


def _measures(results: Results) -> dict[str, Any] | None:
    """A row for each measure of the registry, a column for each model that is shown; None without
    records.
    """
    names = dict.fromkeys(
        n
        for m in results.shown
        if (r := results.record(m)) is not None
        for n in r.get("measures", {})
    )
    if not names:
        return None
    rows = [
        [name, *(_measured(results.measure(m, name), _unit(name)) for m in results.shown)]
        for name in names
    ]
    return {"columns": [label(model) for model in results.shown], "rows": rows}


def _unit(name: str) -> str:
    """The unit of a measure; none of one that the program which evaluated had registered, and this
    one has not.
    """
    try:
        return named(name).unit
    except UserError:
        return ""


def _measured(found: Interval | None, unit: str) -> str:
    if found is None:
        return "–"
    scale, sign = (100, "%") if unit == "%" else (1, "")
    return with_interval(
        f"{scale * found.value:.4g}{sign}", found.low, found.high, lambda end: f"{scale * end:.4g}"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _datasets(results: Results) -> dict[str, Any] | None:
    """Accuracy and tokens of each data set, with the paper's normalised figures; None if there is
    only one set.

    Of a model of several seeds they are the means over these.
    """
    # one data set alone is the whole, which the first table has
    found = {
        m["name"]: _by_dataset(records) for m in results.models if (records := results.records(m))
    }
    names = list(dict.fromkeys(name for own in found.values() for name in own))
    if len(names) < 2:
        return None
    # a row for each model, normalised by the model that it began with
    rows = []
    for model in results.models:
        if (own := found.get(model["name"])) is None:
            continue
        start = (
            None
            if is_base(model) and len(found) == 1
            else found.get(base_name(model, results.models))
        )
        parts = [own.get(name) for name in names]
        try:
            ratio = None if start is None else statistics.normalised(own, start)
        except ValueError:  # a start that solves nothing has no ratio to it
            ratio = None
        # a dash for what was not asked: 0 would be a figure
        rows.append(
            {
                "name": model["name"],
                "label": label(model),
                "cells": [
                    "–" if part is None else f"{part['accuracy']:.1%} / {part['tokens']:,.0f}"
                    for part in parts
                ],
                "normalised": "–"
                if ratio is None
                else f"{ratio['accuracy']:.1%} / {ratio['tokens']:.1%}",
            }
        )
    return {"names": names, "rows": rows}


def _by_dataset(records: list[Record]) -> dict[str, dict[str, float]]:
    """Accuracy and tokens of each data set that all these records have, each the mean over them."""
    first, *others = (record["datasets"] for record in records)
    return {
        name: {key: fmean(each[name][key] for each in (first, *others)) for key in FIGURES}
        for name in first
        if all(name in each for each in others)
    }
