"""Lengths of right and of wrong responses."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from megatron_efr.evaluation.records import Record
from megatron_efr.report import plots
from megatron_efr.report.records import label
from megatron_efr.report.results import Results

_PERCENTILES = (10, 25, 50, 75, 90)


def build(results: Results) -> dict[str, Any] | str:
    """A range for each model, of right responses and of wrong ones, and the table; over all seeds
    of a model.
    """
    models = [model for model in results.models if results.records(model)]
    if not models:
        return "No evaluation is in this folder."
    found = [
        tuple(_percentiles(_lengths(results.records(m), right)) for right in (True, False))
        for m in models
    ]
    most = max((p[-1] for pair in found for _, p in pair if len(p)), default=1.0)
    drawn = []
    for side, title in enumerate(("Right", "Wrong")):
        texts = [label(model) if side == 0 else "" for model in models]
        ranges = [
            plots.Range(text, results.hues[model["name"]], pair[side][1].tolist())
            for text, model, pair in zip(texts, models, found, strict=True)
        ]
        drawn.append((title, partial(plots.draw_ranges, ranges=ranges, x="tokens", most=most)))
    alt = "range of lengths of each model, the figures are in the table below"
    size = (4.4, 1.2 + 0.32 * len(models))
    return {
        "plots": results.draw("lengths", drawn, size, alt, columns=2),
        "rows": [
            [label(m), *(_written(*each) for each in pair)]
            for m, pair in zip(models, found, strict=True)
        ],
    }


def _lengths(records: list[Record], right: bool) -> np.ndarray:
    """Tokens of all right responses, or of all wrong ones."""
    rows = [row for record in records for row in record["rows"]]
    tokens = np.array([count for row in rows for count in row["tokens"]], dtype=float)
    return tokens[
        np.array([value == right for row in rows for value in row["correct"]], dtype=bool)
    ]


def _percentiles(lengths: np.ndarray) -> tuple[int, np.ndarray]:
    return len(lengths), np.percentile(lengths, _PERCENTILES) if len(lengths) else np.array([])


def _written(count: int, percentiles: np.ndarray) -> str:
    """`40 [22, 97] of 3,100`: median, 10th and 90th percentile, number of responses."""
    if not count:
        return "none"
    low, _, middle, _, high = percentiles
    return f"{middle:.0f} [{low:.0f}, {high:.0f}] of {count:,}"
