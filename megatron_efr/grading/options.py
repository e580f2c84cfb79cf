"""Reads an option letter: `C`, `(C)`, `C. 5`, `\\text{C}`."""

from __future__ import annotations

import re

# another letter, or a formula: no option
_MORE = re.compile(r"(?:and|or|to|&|,|[-+*/=^<>])", re.IGNORECASE)
_OPTION = re.compile(
    r"(?:(?:option|choice|answer)\s*)?(?:[(\[]\s*([A-Za-z])\s*[)\]]|([A-Z])(?:\)|[.:](?=[\s\\]|$)|$))[.):]?\s*(.*)",
    re.IGNORECASE,
)


def option(text: str, small: bool = False) -> tuple[str, str] | None:
    """(letter, what follows) of a normalised answer such as `C`, `(C)`, `[C]`, `C. 5`, `C) 5`; None
    for any other.

    Without brackets a `small` letter counts if nothing but options is asked for: elsewhere `c` is a
    variable.
    """
    plain = text.replace("\\text{", "").replace("}", "", text.count("\\text{"))
    found = _OPTION.fullmatch(plain.strip())
    if not found:
        return None
    if _MORE.match(found.group(3)):
        return None
    letter = found.group(1) or found.group(2)
    if found.group(2) and not (small or found.group(2).isupper()):
        return None
    return letter.upper(), found.group(3).strip()
