"""Finds the answer in a response: in its last box or boxes, after a marker, its last number, or all
of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from megatron_efr.grading.boxed import answers, last_boxed
from megatron_efr.grading.compare import count_parts

Place = Literal["last_box", "boxes", "marker", "last_number", "whole"]

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"(?:(?<![\w.)])[-+])?(?<![\w.])(?:{_DIGITS})(?:[eE][-+]?\d+)?(?:/\d+)?\s?%?")
_DECORATION = " \t\r*`"  # Markdown's emphasis, which a marker often stands in


@dataclass(frozen=True, slots=True)
class Extractor:
    """The place of a response's answer; `marker` is the text that it follows, for that place
    alone.
    """

    place: Place = "last_box"
    marker: str = ""

    def __call__(self, response: str, gold: str) -> str | None:
        """The answer as it is written; None if there is none."""
        if self.place == "marker":
            return after_marker(response, self.marker)
        if self.place == "last_number":
            return last_number(response)
        if self.place == "whole":
            return response.strip() or None
        if self.place == "boxes":
            return answers(response, "boxes", count_parts(gold))
        return last_boxed(response)


LAST_BOX = Extractor()


def after_marker(text: str, marker: str) -> str | None:
    """The text after the last `marker`: the rest of its line, or, if nothing is left of it, the
    next line.
    """
    _, found, rest = text.rpartition(marker)
    if not found:
        return None
    lines = (line.strip(_DECORATION) for line in rest.split("\n"))
    return next(filter(None, lines), None)


def last_number(text: str) -> str | None:
    """The last number in digits (`-1,234.5`, `3/4`, `1e-3`, `12%`), without its commas; None if
    there is none.

    A digit that is part of a word (`x2`) is no number, and a dash after a digit, a letter or `)` is
    no sign.
    """
    plain = text.replace("{,}", ",").replace("\\%", "%").replace("−", "-")
    found = [match.group() for match in _NUMBER.finditer(plain)]
    return "".join(found[-1].split()).replace(",", "") if found else None
