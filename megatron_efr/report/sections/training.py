"""Curves of training: accuracy, tokens, reward and KL of each iteration."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron_efr.report import plots
from megatron_efr.report.results import PANEL, Results, runs_of


def build(results: Results) -> dict[str, Any] | str:
    """A line for each run, in its model's colour."""
    shown_keys = [key for key, _ in plots.CURVES]
    # runs of the models that are shown, in the models' order
    names = {run: model["name"] for model in results.models for run in runs_of(model)}
    shown = {model["name"] for model in results.shown}
    runs = [
        (names.get(run, run), lines)
        for run, lines in results.metrics.items()
        if (run not in names or names[run] in shown)
        and any(line.get(key) is not None for line in lines for key in shown_keys)
    ]
    runs.sort(key=lambda each: list(results.hues).index(each[0]))
    coloured = [(results.hues[name], lines) for name, lines in runs]
    # a panel for each metric that some run has
    drawn = [
        (title[0].upper() + title[1:], partial(plots.draw_curve, runs=coloured, key=key))
        for key, title in plots.CURVES
        if any(line.get(key) is not None for _, lines in runs for line in lines)
    ]
    if not drawn:
        return "No training metrics are in this folder."
    # the key, a name for each colour
    labels = {name: text for text, name in results.key(results.models)}
    key = [(labels.get(name) or name, name) for name in dict.fromkeys(name for name, _ in runs)]
    alt = "against the iteration, a line for each run"
    return {
        "plots": results.draw("curves", drawn, PANEL, alt, columns=2, key=results.coloured(key)),
        "key": key,
        "choice": results.choice,
    }
