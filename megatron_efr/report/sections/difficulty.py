"""Tokens and accuracy at each difficulty, and whether easy problems shrink more than hard ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any

from megatron_efr.evaluation import statistics
from megatron_efr.evaluation.records import Record
from megatron_efr.report import plots
from megatron_efr.report.records import label
from megatron_efr.report.results import PANEL, Results
from megatron_efr.report.sentences import base_of, difficulty_sentences, is_base


def build(results: Results) -> dict[str, Any] | str:
    """Plots of tokens, of tokens relative to the base and of accuracy; what they say; the table."""
    models = results.models
    levels = statistics.in_order(
        {level for model in models for level in model["tokens_by_difficulty"]}
    )
    if not levels:
        return "The evaluated problems carry no difficulty, or none were evaluated."
    records = {m["name"]: _together(found) for m in models if (found := results.records(m))}
    key = results.key(results.shown)
    drawn = _drawn(results, levels)
    alt = "against difficulty; tokens are in the table below"
    return {
        "sentences": difficulty_sentences(results.shown, records),
        "choice": results.choice,
        "plots": results.draw(
            "difficulty", drawn, PANEL, alt, columns=2, key=results.coloured(key)
        ),
        "key": key,
        "levels": levels,
        "rows": [
            [label(m), *(_number(m["tokens_by_difficulty"].get(level)) for level in levels)]
            for m in models
        ],
    }


def _drawn(results: Results, levels: Sequence[str]) -> list[tuple[str, plots.Draw]]:
    # tokens as they are
    draw = partial(plots.draw_lines, x="difficulty", ticks=levels, from_zero=True)
    lines = [_line(results, m, levels, m["tokens_by_difficulty"]) for m in results.shown]
    drawn: list[tuple[str, plots.Draw]] = [
        ("Mean tokens", partial(draw, lines=lines, y="mean tokens"))
    ]
    # as shares of the one base: the same share of a hard problem is many more tokens
    if (base := base_of(results.models)) is not None and sum(map(is_base, results.models)) == 1:
        start = base["tokens_by_difficulty"]
        shares = [
            {
                level: 100 * tokens / start[level]
                for level, tokens in m["tokens_by_difficulty"].items()
                if start.get(level)
            }
            for m in results.shown
        ]
        lines = [
            _line(results, m, levels, share) for m, share in zip(results.shown, shares, strict=True)
        ]
        drawn.append(
            (
                f"Relative to {label(base)}",
                partial(draw, lines=lines, y=f"tokens (% of {label(base)})"),
            )
        )
    # accuracy, of the models whose records are here
    lines = [
        _line(results, m, levels, _accuracy(found))
        for m in results.shown
        if (found := results.records(m))
    ]
    return [*drawn, ("Accuracy", partial(draw, lines=lines, y="accuracy (%)"))] if lines else drawn


def _accuracy(records: Sequence[Record]) -> dict[str, float]:
    """Accuracy (%) at each difficulty, the mean over a model's runs."""
    rates = [record["accuracy_by_difficulty"] for record in records]
    return {
        level: 100 * fmean(each[level] for each in rates)
        for level in rates[0]
        if all(level in r for r in rates)
    }


def _together(records: Sequence[Record]) -> Record:
    """A model's runs as one record, whose rows have the tokens of all runs' responses to a
    problem.
    """
    rows: dict[str, Record] = {}
    for row in (row for record in records for row in record["rows"]):
        before = rows[row["id"]]["tokens"] if row["id"] in rows else []
        rows[row["id"]] = {
            "id": row["id"],
            "difficulty": row["difficulty"],
            "tokens": [*before, *row["tokens"]],
        }
    return {"rows": list(rows.values())}


def _line(
    results: Results, model: Record, levels: Sequence[str], values: dict[str, float]
) -> plots.Line:
    known = [level for level in levels if level in values]
    return plots.Line(
        results.hues[model["name"]],
        [levels.index(level) for level in known],
        [values[k] for k in known],
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
