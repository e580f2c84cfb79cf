"""Curves in a terminal: points as braille dots, two columns and four rows of dots to a
character.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from rich.text import Text

Points = Sequence[tuple[float, float]]

# Unicode's bits of a braille cell, by row and column
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BLANK = 0x2800


class Curve(NamedTuple):
    """A line through `points`, (x, y) with rising x, drawn in a rich `style`."""

    points: Points
    style: str


class Extent(NamedTuple):
    """The range of what is drawn."""

    left: float
    right: float
    low: float
    high: float


def extent(curves: Sequence[Curve]) -> Extent:
    """The range of all points; one of no height is widened, so that a constant is drawn half way
    up.
    """
    points = [point for curve in curves for point in curve.points]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low = min(ys)
    high = max(ys)
    if low == high:
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    return Extent(min(xs), max(xs), low, high)


def draw(curves: Sequence[Curve], width: int, height: int) -> list[Text]:
    """`height` lines of `width` characters. Where curves meet in a character, its colour is the
    last one's.
    """
    cells, styles = [[0] * width for _ in range(height)], [[""] * width for _ in range(height)]
    within = extent(curves)
    for curve in curves:
        for column, row in _dots(curve.points, within, 2 * width, 4 * height):
            cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
            styles[row // 4][column // 2] = curve.style
    lines = []
    for row, colours in zip(cells, styles, strict=True):
        line = Text()
        for cell, style in zip(row, colours, strict=True):
            line.append(chr(_BLANK + cell), style)
        lines.append(line)
    return lines


def _dots(points: Points, within: Extent, columns: int, rows: int) -> list[tuple[int, int]]:
    """The (column, row) of every dot of a line through the points; row 0 is at the top."""
    across = (columns - 1) / ((within.right - within.left) or 1.0)
    up = (rows - 1) / (within.high - within.low)
    placed = [((x - within.left) * across, (within.high - y) * up) for x, y in points]
    if len(placed) == 1:
        placed = placed * 2
    dots = []
    for (x0, y0), (x1, y1) in pairwise(placed):
        steps = max(1, round(max(abs(x1 - x0), abs(y1 - y0))))
        for step in range(steps + 1):
            share = step / steps
            dots.append((round(x0 + share * (x1 - x0)), round(y0 + share * (y1 - y0))))
    return dots
