"""Reads intervals, unions and inequalities in one variable as sets of real numbers."""

from __future__ import annotations

import re

from megatron_efr.grading.forms import Form, read
from megatron_efr.grading.numbers import read_number

Edge = tuple[Form, bool]  # an end of an interval, and whether it belongs to it
Interval = tuple[Edge, Edge]


def region(form: Form) -> tuple[str, list[Interval]] | None:
    """(variable or empty, intervals) of a form; None where it is no region of numbers."""
    if form.kind == "group" and len(form.items) == 2:
        low, high = form.items
        return "", [((low, form.left == "["), (high, form.right == "]"))]
    if form.kind == "set":
        return "", [((item, True), (item, True)) for item in form.items]
    if form.kind == "expression" and form.text == "\\mathbb{R}":
        return "", [((_LOWEST, False), (_HIGHEST, False))]
    if form.kind in ("union", "list") and form.name != "\\pm":
        pieces = [region(item) for item in form.items]
        if any(piece is None for piece in pieces):
            return None
        names = {piece[0] for piece in pieces if piece}
        return (names.pop() if len(names) == 1 else "?"), [
            interval for piece in pieces if piece for interval in piece[1]
        ]
    return _inequality(form) if form.kind == "relation" else None


_LOWEST, _HIGHEST = Form("expression", "-\\infty"), Form("expression", "\\infty")
_ABSOLUTE = re.compile(r"\| ?([a-z]) ?\|")
_CLOSED = {"<": False, "\\le": True, ">": False, "\\ge": True}


def _inequality(form: Form) -> tuple[str, list[Interval]] | None:
    items, signs = form.items, form.signs
    if signs == ("\\in",):
        inner = region(items[1])
        return inner and (items[0].text, inner[1])
    if signs == ("\\ne",):
        return items[0].text, [((_LOWEST, False), (items[1], False)), ((items[1], False), (_HIGHEST, False))]
    if not set(signs) <= set(_CLOSED):
        return None
    if signs[0] in (">", "\\ge"):
        items, signs = items[::-1], tuple({">": "<", "\\ge": "\\le"}.get(sign, "") for sign in reversed(signs))
    if not set(signs) <= {"<", "\\le"}:
        return None
    if len(items) == 3 and (inner := _ABSOLUTE.fullmatch(items[1].text)) and (low := read_number(items[0].text)):
        if low.value <= 0:
            return None
        ends = [(items[0], _CLOSED[signs[0]]), (items[2], _CLOSED[signs[1]])]
        below = [(read(f"-({end.text})"), closed) for end, closed in reversed(ends)]
        return inner.group(1), [(below[0], below[1]), (ends[0], ends[1])]
    if len(items) == 3:
        return items[1].text, [((items[0], _CLOSED[signs[0]]), (items[2], _CLOSED[signs[1]]))]
    if len(items) == 2 and _variable(items[0]):
        return items[0].text, [((_LOWEST, False), (items[1], _CLOSED[signs[0]]))]
    if len(items) == 2 and _variable(items[1]):
        return items[1].text, [((items[0], _CLOSED[signs[0]]), (_HIGHEST, False))]
    return None


def _variable(form: Form) -> bool:
    return (
        bool(re.fullmatch(r"\|?\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\([a-z]\))?\|?", form.text)) and "\\infty" not in form.text
    )
