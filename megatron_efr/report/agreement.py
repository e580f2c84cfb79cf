"""Agreement of two families that should be the same, however they were made, by their figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_efr.errors import UserError
from megatron_efr.evaluation.records import Record
from megatron_efr.report.records import FIGURES, figure, label

WRITTEN = {
    "accuracy": (lambda value: f"{100 * value:.1f}", "%"),
    "tokens": (lambda value: f"{value:.1f}", ""),
}


class Compared(NamedTuple):
    """One figure of one model, in both families."""

    key: str
    one: Mapping[str, Any]
    other: Mapping[str, Any]

    @property
    def gap(self) -> float:
        """Gap between the 95% intervals, in the figure's unit; 0 if they overlap."""
        (low, high), (others_low, others_high) = (
            model[f"{self.key}_ci"] for model in (self.one, self.other)
        )
        return max(low - others_high, others_low - high, 0.0)

    @property
    def agree(self) -> bool:
        """True if the 95% intervals overlap.

        Those of two samples of one distribution, equally wide, do not in 0.6% of cases. What chance
        does to training is not in them.
        """
        return self.gap == 0

    def row(self) -> str:
        """A row of `agreement_markdown`."""
        write, unit = WRITTEN[self.key]
        texts = (figure(model, self.key, write, unit) for model in (self.one, self.other))
        return (
            f"| {label(self.one)} | {self.key} | {' | '.join(texts)} | "
            f"{'agree' if self.agree else 'APART'} |"
        )


def compare(one: Record, other: Record) -> list[Compared]:
    """Every figure of every model, from two families' summaries; UserError if they are of other
    models.
    """
    ours, theirs = ([label(model) for model in summary["models"]] for summary in (one, other))
    if ours != theirs:
        raise UserError(
            f"families of other models cannot be compared: {', '.join(ours)}; and "
            f"{', '.join(theirs)}"
        )
    pairs = list(zip(one["models"], other["models"], strict=True))
    if any(not model.get(f"{key}_ci") for pair in pairs for model in pair for key in FIGURES):
        raise UserError(
            "families over several seeds have no intervals; compare those of single seeds"
        )
    return [Compared(key, *pair) for pair in pairs for key in FIGURES]


def agreement_markdown(compared: list[Compared], one: str, other: str) -> str:
    """The comparison as a markdown table, under the families' names."""
    apart = sum(not found.agree for found in compared)
    heading = [f"| model | figure | {one} | {other} | |", "|---|---|---:|---:|---|"]
    words = (
        f"In brackets: 95% intervals. {len(compared) - apart} of {len(compared)} figures agree: "
        "theirs overlap."
    )
    return "\n".join([*heading, *(found.row() for found in compared), "", words])
