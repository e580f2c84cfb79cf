"""Finds the answer in a response: the content of its last \\boxed{}."""

from __future__ import annotations

import re

_OPENING = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # `\{` and `\}` are printed braces and close nothing


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}` in `text`, braces matched; None where there is none, or nothing in it.

    A last box that never closes is no answer: an earlier box is not taken in its place, since the response went on.
    """
    end = len(text)
    while (start := text.rfind("\\boxed", 0, end)) >= 0:
        if opening := _OPENING.match(text, start):
            return _content(text, opening.end())
        end = start  # the bare word, not a box
    return None


def _content(text: str, start: int) -> str | None:
    """What stands between the brace that opened just before `start` and the one that closes it."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        if brace.group() == "{":
            depth += 1
        elif brace.group() == "}":
            depth -= 1
            if depth == 0:
                return text[start : brace.start()].strip() or None
    return None
