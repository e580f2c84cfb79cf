"""Which models are apart beyond the chance of training, against one that the sweep names."""

from __future__ import annotations

from typing import Any

from megatron_efr.report.differences import Difference, differences
from megatron_efr.report.records import label
from megatron_efr.report.results import Results
from megatron_efr.report.sentences import is_base

_WORDS = {
    "accuracy": {1: "more accurate", -1: "less accurate", 0: "not told apart"},
    "tokens": {1: "longer", -1: "briefer", 0: "not told apart"},
}


def build(results: Results) -> dict[str, Any] | str:
    """A row for each model of several seeds: its differences from the reference, and what they say."""
    models = [model for model in results.models if len(model.get("accuracy_by_seed", ())) > 1 and not is_base(model)]
    if len(models) < 2:
        return (
            "Only runs of several seeds show what training's chance does, and two such models are needed; "
            "`efr sweep` makes them with vary: {seed: [1, 2, 3]}."
        )
    by_name = {model["name"]: model for model in models}
    reference = by_name.get(results.summary.get("against", ""), models[0])
    comparisons = 2 * (len(models) - 1)
    found = {
        key: differences({name: m[f"{key}_by_seed"] for name, m in by_name.items()}, reference["name"], comparisons)
        for key in _WORDS
    }
    rows = [
        [label(model), *(_cell(key, found[key][model["name"]]) for key in _WORDS)]
        for model in models
        if model is not reference
    ]
    return {"sentence": _sentence(label(reference), found, comparisons), "rows": rows, "reference": label(reference)}


def _sentence(reference: str, found: dict[str, dict[str, Difference]], comparisons: int) -> str:
    count = len(found["tokens"])
    briefer = sum(each.side < 0 for each in found["tokens"].values())
    longer = sum(each.side > 0 for each in found["tokens"].values())
    better = sum(each.side > 0 for each in found["accuracy"].values())
    worse = sum(each.side < 0 for each in found["accuracy"].values())
    return (
        f"Of {count} models, {briefer} are briefer than {reference} beyond chance and {longer} longer; {better} are "
        f"more accurate and {worse} less. In brackets: intervals that hold for all {comparisons} differences together "
        "in 95% of cases, from the spread over seeds, pooled over all models. They are of training's chance alone, on "
        "these problems."
    )


def _cell(key: str, found: Difference) -> str:
    scale, unit = (100, " points") if key == "accuracy" else (1, "")
    value, low, high = (f"{scale * each:+.1f}".replace("-", "−") for each in found)
    return f"{value}{unit} [{low}, {high}]: {_WORDS[key][found.side]}"
