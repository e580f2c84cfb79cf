"""Material of a report: a family's figures, evaluations, its runs' metrics, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from markupsafe import Markup

from megatron_efr.evaluation.records import Record
from megatron_efr.report import plots
from megatron_efr.report.differences import Interval
from megatron_efr.report.records import label
from megatron_efr.report.sentences import front, is_base

Metrics = Mapping[str, Sequence[Mapping[str, Any]]]

MOST_LINES = 8
"""Models that a plot of lines shows; of a larger family the bases and the front."""

PANEL = (4.4, 3.1)  # inches: small enough that its letters stay readable on a phone


@dataclass(frozen=True)
class Results:
    """Results of a family: `evaluations`, `metrics` by run, `configs` by source; `out` has
    pictures.
    """

    summary: Record
    evaluations: Mapping[str, Record]
    metrics: Metrics
    out: Path
    configs: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def models(self) -> list[Record]:
        """The family's models, bases first."""
        return self.summary["models"]

    @cached_property
    def hues(self) -> dict[str, str]:
        """The colour of every model, and of every run that no model stands for."""
        found = plots.colours([(model["name"], is_base(model)) for model in self.models])
        owned = {run for model in self.models for run in runs_of(model)}
        for run in self.metrics:
            if run not in owned:
                found |= plots.colours([(run, False)])
        return found

    @cached_property
    def shown(self) -> list[Record]:
        """The models that plots of lines show."""
        if len(self.models) <= MOST_LINES:
            return self.models
        best = {model["name"] for model in front(self.models)}
        return [model for model in self.models if is_base(model) or model["name"] in best][
            : 2 * MOST_LINES
        ]

    @property
    def choice(self) -> str:
        """The sentence that says which models are shown; empty if all are."""
        if len(self.shown) == len(self.models):
            return ""
        names = ", ".join(label(model) for model in self.shown)
        return (
            f"Lines are drawn of the base and of the models on the front: {names}. The tables "
            "have all."
        )

    def records(self, model: Record) -> list[Record]:
        """The evaluation of each of a model's runs; none if one is missing, since a figure of fewer
        seeds is another than the model's.
        """
        runs = runs_of(model)
        seeds = len(model.get("accuracy_by_seed", ()))
        found = [self.evaluations[run] for run in runs if run in self.evaluations]
        return found if len(found) == len(runs) >= seeds else []

    def record(self, model: Record) -> Record | None:
        """The evaluation of a model's first run."""
        return self.evaluations.get(runs_of(model)[0])

    def measure(self, model: Record, name: str) -> Interval | None:
        """A measure of a model; None if a record lacks it, or a seed its record. Its interval is
        that of one run, or over seeds one deviation either way.
        """
        found = [record.get("measures", {}).get(name) for record in self.records(model)]
        if not found or any(each is None or each["value"] is None for each in found):
            return None
        if len(found) == 1:
            return Interval(found[0]["value"], found[0]["low"], found[0]["high"])
        values = [each["value"] for each in found]
        middle = fmean(values)
        reach = stdev(values)
        return Interval(middle, middle - reach, middle + reach)

    def draw(
        self,
        name: str,
        drawn: Sequence[tuple[str, plots.Draw]],
        size: tuple[float, float],
        alt: str,
        **saved: Any,
    ) -> list[tuple[str, Markup]]:
        """Keep titled plots as NAME.png and NAME.svg, side by side; returns each with its title, to
        stand in the page.

        `alt` is what a screen reader says; `saved` goes to `plots.save`: `columns`, and a `key` of
        models.
        """
        plots.save(drawn, self.out / name, size, **saved)
        shown: list[tuple[str, Markup]] = []
        for i, (title, draw) in enumerate(drawn):
            text = f"{title}: {alt}" if title else alt
            shown.append((title, Markup(plots.svg(draw, size, f"{name}{i}", self.hues, text))))
        return shown

    def key(self, models: Sequence[Record]) -> list[tuple[str, str]]:
        """A legend's entries: label and name."""
        return [(label(model), model["name"]) for model in models]

    def coloured(self, entries: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """A legend's entries as pictures take them: label and colour."""
        return [(text, self.hues[name]) for text, name in entries]


def runs_of(model: Record) -> list[str]:
    """The names of a model's runs; of a summary of before, its own."""
    return model.get("runs") or [model["name"]]
