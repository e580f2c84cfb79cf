"""Reads intervals, unions, differences and inequalities in one variable as sets of real numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from megatron_efr.grading import algebra
from megatron_efr.grading.forms import REALS, Form, read
from megatron_efr.grading.numbers import read_number

Edge = tuple[Form, bool]  # an end of an interval, and whether it belongs to it
Interval = tuple[Edge, Edge]
Region = tuple[str, list[Interval]]

_LOWEST, _HIGHEST = Form("expression", "-\\infty"), Form("expression", "\\infty")
_ALL: Interval = (_LOWEST, False), (_HIGHEST, False)


def region(form: Form) -> Region | None:
    """(variable or empty, intervals) of a form; None if it is no region of numbers."""
    if form.kind == "group" and len(form.items) == 2:
        low, high = form.items
        return "", [((low, form.left == "["), (high, form.right == "]"))]
    if form.kind == "set":
        return "", [((item, True), (item, True)) for item in form.items]
    if form.kind == "expression" and form.text == REALS:
        return "", [_ALL]
    if form.kind == "difference":
        return _without(form.items[0], form.items[1].items) if form.items[1].kind == "set" else None
    if form.kind == "list" and (excluded := _excluded(form)):
        return excluded
    if form.kind == "union" or (
        form.kind == "list" and all(item.kind == "relation" for item in form.items)
    ):
        return _together(form.items)
    return _inequality(form) if form.kind == "relation" else None


def _together(items: Sequence[Form]) -> Region | None:
    pieces = [region(item) for item in items]
    names = {piece[0] for piece in pieces if piece}
    if None in pieces:
        return None
    return (names.pop() if len(names) == 1 else "?"), [
        interval for piece in pieces if piece for interval in piece[1]
    ]


def _excluded(form: Form) -> Region | None:
    """`x \\ne 1, x \\ne 2`, `x \\ne 1, 2` and `x \\in \\mathbb{R}, x \\ne 1`: all of these hold
    together.
    """
    first = form.items[0]
    if first.kind != "relation" or first.signs not in (("\\ne",), ("\\in",)):
        return None
    if first.signs == ("\\in",) and first.items[1].text != REALS:
        return None
    name = first.items[0].text
    points = list[Form]()
    for item in form.items[first.signs == ("\\in",) :]:
        if item.kind == "expression" and points:
            points.append(item)
        elif item.kind == "relation" and item.signs == ("\\ne",) and item.items[0].text == name:
            points.append(item.items[1])
        else:
            return None
    found = _without(Form("expression", REALS), points)
    return found and (name, found[1])


def _without(whole: Form, points: Sequence[Form]) -> Region | None:
    """The real numbers but for some points; None if `whole` is less, or the order of the points is
    not known.
    """
    inner = region(whole)
    if inner is None or [edge.text for edge, _ in inner[1][0]] != [_LOWEST.text, _HIGHEST.text]:
        return None
    valued = [(value, point) for point in points if (value := _value(point)) is not None]
    if len(valued) < len(points):
        return None
    ends = [_LOWEST, *(point for _, point in sorted(valued, key=lambda pair: pair[0])), _HIGHEST]
    return inner[0], [((low, False), (high, False)) for low, high in pairwise(ends)]


def _value(form: Form) -> float | None:
    """About how large a real constant is."""
    if number := read_number(form.text):
        return float(number.value)
    try:
        return float(algebra.parse(form.text))
    except (algebra.UnreadableError, TypeError, ValueError, OverflowError, AttributeError):
        return None


_ABSOLUTE = re.compile(r"\| ?([a-z])(?: ?([-+]) ?([^|]+?))? ?\|")
_CLOSED = {"<": False, "\\le": True, ">": False, "\\ge": True}


def _inequality(form: Form) -> tuple[str, list[Interval]] | None:
    items, signs = form.items, form.signs
    if signs == ("\\in",):
        inner = region(items[1])
        return inner and (items[0].text, inner[1])
    if signs == ("\\ne",):
        return items[0].text, [
            ((_LOWEST, False), (items[1], False)),
            ((items[1], False), (_HIGHEST, False)),
        ]
    if not set(signs) <= set(_CLOSED):
        return None
    if signs[0] in (">", "\\ge"):
        items = items[::-1]
        signs = tuple({">": "<", "\\ge": "\\le"}.get(sign, "") for sign in reversed(signs))
    if not set(signs) <= {"<", "\\le"}:
        return None
    if (absolute := _absolute(items, signs)) is not None:
        return absolute
    if len(items) == 3:
        return items[1].text, [((items[0], _CLOSED[signs[0]]), (items[2], _CLOSED[signs[1]]))]
    if len(items) == 2 and _variable(items[0]):
        return items[0].text, [((_LOWEST, False), (items[1], _CLOSED[signs[0]]))]
    if len(items) == 2 and _variable(items[1]):
        return items[1].text, [((items[0], _CLOSED[signs[0]]), (_HIGHEST, False))]
    return None


def _absolute(items: Sequence[Form], signs: Sequence[str]) -> Region | None:
    """`|x - c| < b`, `a < |x - c| < b`, `|x - c| > a` for positive bounds; `signs` are `<` and
    `\\le`.
    """
    # one absolute value, and bounds that are known to be positive
    found = {
        index: match
        for index, item in enumerate(items)
        if (match := _ABSOLUTE.fullmatch(item.text))
    }
    bounds = [item for index, item in enumerate(items) if index not in found]
    if len(found) != 1 or not all((_value(bound) or 0) > 0 for bound in bounds):
        return None
    # centre and radius: |x - c| < b has the edges c - b and c + b
    [place] = found
    name, sign, shift = found[place].groups()
    centre = f"{'-' if sign == '+' else ''}({shift})" if shift else ""

    def edge(bound: Form, side: str, closed: bool) -> Edge:
        return read(
            f"{centre}{side}({bound.text})" if centre or side == "-" else bound.text
        ), closed

    # the bounds on its left and right, each with whether it belongs to the region
    below = [(item, _CLOSED[sign]) for item, sign in zip(items[:place], signs[:place], strict=True)]
    above = [
        (item, _CLOSED[sign]) for item, sign in zip(items[place + 1 :], signs[place:], strict=True)
    ]
    # bounded above alone: one interval about the centre
    if not below:
        [(high, closed)] = above
        return name, [(edge(high, "-", closed), edge(high, "+", closed))]
    # bounded below: two intervals, out to the upper bound or without end
    [(low, closed)] = below
    left: Edge = (edge(above[0][0], "-", above[0][1])) if above else (_LOWEST, False)
    right: Edge = (edge(above[0][0], "+", above[0][1])) if above else (_HIGHEST, False)
    return name, [(left, edge(low, "-", closed)), (edge(low, "+", closed), right)]


def _variable(form: Form) -> bool:
    return (
        bool(re.fullmatch(r"\|?\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\([a-z]\))?\|?", form.text))
        and "\\infty" not in form.text
    )
