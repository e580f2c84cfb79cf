"""Finds the answer in a response: the content of its last \\boxed{}, or of the boxes of its last
statement.
"""

from __future__ import annotations

import re

# What may stand between two boxes of one statement: little, or a short text with a word or mark
# that joins.
_JOINED = re.compile(r"^.{0,9}$|^(?=.{0,80}$).*(?:[,;:=&\n]|\b(?:and|or)\b)", re.DOTALL)
_BOX_NAME = re.compile(r"([A-Za-z]+(?:_\{?\w+\}?)?)\s*=\s*[$\s\\(\[]*$")
_OPENING = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # `\{` and `\}` are printed braces and close nothing


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}` in `text`, braces matched; None if there is none, or
    nothing in it.

    A last box that never closes is no answer: an earlier box is not taken in its place, since the
    response went on.
    """
    end = len(text)
    while (start := text.rfind("\\boxed", 0, end)) >= 0:
        if opening := _OPENING.match(text, start):
            return _content(text, opening.end())
        end = start  # the bare word, not a box
    return None


def _content(text: str, start: int) -> str | None:
    """The text between the brace that opened just before `start` and the one that closes it."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        if brace.group() == "{":
            depth += 1
        elif brace.group() == "}":
            depth -= 1
            if depth == 0:
                return text[start : brace.start()].strip() or None
    return None


def boxes(text: str) -> list[str]:
    """Contents of the boxes of the last statement, in order: the last one, and each close before
    the next.

    A box that stands after `k =` brings that name along: `k = \\boxed{45}` gives `k = 45`. Empty if
    `last_boxed` finds nothing.
    """
    if last_boxed(text) is None:
        return []
    found: list[str] = []
    position, before = 0, 0
    for opening in _OPENING.finditer(text):
        if opening.start() < position:
            continue  # a box within a box
        content = _content(text, opening.end())
        if content is None:
            continue
        if found and not _JOINED.search(text[position : opening.start()]):
            found = []
        name = _BOX_NAME.search(text[before : opening.start()])
        named = name and "=" not in content
        found.append(f"{name.group(1)} = {content}" if name and named else content)
        position = before = text.find("}", opening.end() + len(content)) + 1
    return found


def answers(text: str, rule: str, parts: int = 1) -> str | None:
    """The answer of a response by `rule`: "last_box", or "boxes", which joins as many boxes as the
    gold has `parts`.

    Joined answers are set apart by semicolons. If the last statement has another number of boxes,
    or the gold is one value, the last box alone counts.
    """
    last = last_boxed(text)
    if rule == "last_box" or parts < 2:
        return last
    together = boxes(text)
    return "; ".join(together) if len(together) == parts else last
