"""The report's sections, in their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_efr.report.results import Results
from megatron_efr.report.sections import (
    apart,
    budgets,
    difficulty,
    family,
    lengths,
    made,
    problem,
    training,
)

Block = dict[str, Any]
"""Values that a section's template shows."""


class Section(NamedTuple):
    """`build` gives what `sections/<anchor>.html.j2` shows, or the sentence that says why there is
    nothing to show.
    """

    anchor: str
    title: str
    build: Callable[[Results], Block | str]


SECTIONS = (
    Section("family", "Accuracy against tokens", family.build),
    Section("apart", "Apart beyond chance", apart.build),
    Section("budgets", "Accuracy at hard budgets", budgets.build),
    Section("difficulty", "Tokens by difficulty", difficulty.build),
    Section("lengths", "Lengths of right and wrong responses", lengths.build),
    Section("training", "Training", training.build),
    Section("problem", "The same problem, answered by each model", problem.build),
    Section("made", "How it was made", made.build),
)
