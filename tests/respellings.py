"""Usual respellings of an answer, each if it keeps the meaning: what models write instead of what a
gold says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fractions import Fraction

_PLAIN = re.compile(r"-?\d+")
_SIMPLE = re.compile(r"(-?)\\d?frac\s*\{?(\d+)\}?\s*\{(\d+)\}")
_WORDS = re.compile(r"(?:\\text\{)?\(?[A-Za-z]+\)?\}?")


def respellings(gold: str) -> Iterator[tuple[str, str]]:
    """(name, text) of every respelling that changes `gold` and keeps its meaning."""
    for name, change in RESPELLINGS.items():
        text = change(gold)
        if text is not None and text != gold:
            yield name, text


def _dollars(gold: str) -> str | None:
    return None if "$" in gold else f"${gold}$"


def _thousands(gold: str) -> str | None:
    return f"{int(gold):,}" if _PLAIN.fullmatch(gold) and abs(int(gold)) >= 1000 else None


def _thin(gold: str) -> str | None:
    grouped = _thousands(gold)
    return grouped and grouped.replace(",", "\\,")


def _braced_commas(gold: str) -> str | None:
    grouped = _thousands(gold)
    return grouped and grouped.replace(",", "{,}")


def _decimal(gold: str) -> str | None:
    """A fraction that ends as a decimal of at most eight places, and an integer with `.0`."""
    if _PLAIN.fullmatch(gold):
        return f"{gold}.0"
    if not (found := _SIMPLE.fullmatch(gold)) or int(found.group(3)) == 0:
        return None
    value = Fraction(int(found.group(2)), int(found.group(3)))
    scaled = value * 10**8
    return None if scaled.denominator != 1 else f"{found.group(1)}{float(value):.8f}".rstrip("0")


def _slashed(gold: str) -> str | None:
    found = _SIMPLE.fullmatch(gold)
    return f"{found.group(1)}{found.group(2)}/{found.group(3)}" if found else None


def _named(gold: str) -> str | None:
    plain = not re.search(
        r"=|\\in|,(?!\\!|\d{3})|\\text|\\pm|\\mbox|\\cup|\$|[A-Za-z]{4}", gold.replace("frac", "")
    )
    return f"x = {gold}" if plain else None


def _unicode(gold: str) -> str | None:
    text = (
        gold.replace("\\pi", "π")
        .replace("^\\circ", "°")
        .replace("\\infty", "∞")
        .replace("\\cup", "∪")
    )
    text = re.sub(
        r"\\sqrt\{(\d)\}|\\sqrt(\d)", lambda found: f"√{found.group(1) or found.group(2)}", text
    )
    return text.replace("^2", "²").replace("\\pm", "±").replace("\\in ", "∈ ")


def _minus(gold: str) -> str | None:
    return gold.replace("-", "−") if "begin" not in gold and "text" not in gold else None


def _unit(gold: str) -> str | None:
    return f"{gold} \\text{{ apples}}" if _PLAIN.fullmatch(gold) else None


def _bare_unit(gold: str) -> str | None:
    return f"{gold} dollars" if _PLAIN.fullmatch(gold) else None


def _currency(gold: str) -> str | None:
    return f"\\${gold}" if _PLAIN.fullmatch(gold) else None


def _unboxed_text(gold: str) -> str | None:
    return (
        gold.removeprefix("\\text{").removesuffix("}")
        if re.fullmatch(r"\\text\{[^{}]*\}", gold)
        else None
    )


def _text(gold: str) -> str | None:
    return (
        f"\\text{{{gold}}}"
        if _PLAIN.fullmatch(gold) or re.fullmatch(r"[A-Za-z]{2,}", gold)
        else None
    )


def _loose(gold: str) -> str | None:
    """Spaces around operators and inside brackets."""
    if re.search(r"\d,(?:\\!)?\s*\d{3}|begin|text", gold):
        return None
    return (
        re.sub(r"(?<=[\d}a-z])([+=<>])(?=[\d\\a-z])", r" \1 ", gold)
        .replace("(", "( ")
        .replace(",", ", ")
    )


def _left_right(gold: str) -> str | None:
    if re.search(r"left|\[|\]|text", gold):
        return None
    return gold.replace("(", "\\left(").replace(")", "\\right)")


def _large_brackets(gold: str) -> str | None:
    plain = gold.replace("\\left", "").replace("\\right", "")
    if not re.fullmatch(r"[(\[][^()\[\]]*[)\]]", plain):
        return None
    return f"\\bigl{plain[0]}{plain[1:-1]}\\bigr{plain[-1]}"


RESPELLINGS: dict[str, Callable[[str], str | None]] = {
    "display fractions": lambda gold: gold.replace("\\frac", "\\dfrac"),
    "text fractions": lambda gold: gold.replace("\\frac", "\\tfrac").replace("\\dtfrac", "\\tfrac"),
    "large brackets": _large_brackets,
    "no left and right": lambda gold: gold.replace("\\left", "").replace("\\right", ""),
    "left and right": _left_right,
    "spaces around": lambda gold: f"  {gold} ",
    "full stop": lambda gold: f"{gold}.",
    "dollars": _dollars,
    "round delimiters": lambda gold: f"\\({gold}\\)",
    "square delimiters": lambda gold: f"\\[ {gold} \\]",
    "bold": lambda gold: f"**{gold}**",
    "display style": lambda gold: f"\\displaystyle {gold}",
    "colour": lambda gold: f"\\textcolor{{blue}}{{{gold}}}",
    "thin spaces in front": lambda gold: f"\\,{gold}\\;",
    "braces": lambda gold: f"{{{gold}}}",
    "a box within": lambda gold: f"\\boxed{{{gold}}}",
    "display dollars": lambda gold: None if "$" in gold else f"$${gold}$$",
    "lines": lambda gold: f"\n{gold}\n",
    "large": lambda gold: f"\\Large{{{gold}}}",
    "underlined": lambda gold: f"\\underline{{{gold}}}",
    "colour of the rest": lambda gold: f"\\color{{red}}{gold}",
    "framed": lambda gold: f"\\fbox{{{gold}}}",
    "code": lambda gold: f"`{gold}`",
    "tie": lambda gold: f"~{gold}",
    "comma": lambda gold: f"{gold},",
    "wide space": lambda gold: f"{gold}\\quad",
    "line break": lambda gold: f"{gold} \\\\",
    "hard spaces": lambda gold: f"\u00a0{gold}\u2009",
    "headed": lambda gold: f"Answer: {gold}",
    "thousands": _thousands,
    "thin thousands": _thin,
    "braced thousands": _braced_commas,
    "decimal": _decimal,
    "slash": _slashed,
    "name in front": _named,
    "characters": _unicode,
    "minus sign": _minus,
    "unit": _unit,
    "bare unit": _bare_unit,
    "currency": _currency,
    "without text": _unboxed_text,
    "text": _text,
    "spaces within": _loose,
    "equals in front": lambda gold: None if "=" in gold or "\\in" in gold else f"= {gold}",
    "announced": lambda gold: f"The answer is {gold}",
}
