"""Compares two expressions that may carry a unit, a percent sign or a base; and texts letter by
letter.
"""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_efr.grading import algebra
from megatron_efr.grading.algebra import UnreadableError
from megatron_efr.grading.numbers import Number, read_number, same_number
from megatron_efr.grading.units import same_unit, split_unit

_LONGEST = 2000  # characters of a text whose unit is looked for


def same_quantity(gold: str, answer: str) -> bool:
    """Expressions with or without a unit."""
    if len(gold) > _LONGEST or len(answer) > _LONGEST:
        return gold == answer or algebra.equal(gold, answer)
    gold_core, gold_unit, gold_times = split_unit(gold)
    if gold_unit is None and gold_times == 1 and not _is_plain(gold):
        return _same_algebra(gold, answer)
    core, unit, times = split_unit(answer)
    gold_core, gold_base = split_base(gold_core)
    core, base = split_base(core)
    if base is not None or gold_base is not None:
        return gold_core.lstrip("0") == core.lstrip("0") and (
            base is None or gold_base is None or base == gold_base
        )
    if not same_unit(gold_unit, unit):
        return _same_percent(gold_core, gold_unit, core, unit)
    if _equal_times(gold_core, gold_times, core, times):
        return True
    return (gold_unit is None or unit is None) and _same_percent(gold_core, gold_unit, core, unit)


def _same_algebra(gold: str, answer: str) -> bool:
    """A gold with letters or `\\pi`: as algebra first, since it may write what elsewhere would be a
    unit.
    """
    core, unit, times = split_unit(answer)
    spelled = unit is not None and times == 1 and _SPELLED_UNIT.search(answer) is not None
    try:
        if algebra.equal(gold, _in_radians(answer)):
            return True
    except UnreadableError:
        if not spelled:
            raise
    return spelled and algebra.equal(gold, core)


# one bare letter would be a variable
_SPELLED_UNIT = re.compile(r"\\text\{|%|\\degree|[A-Za-z]{2,}[\s.^{}\d]*$")


def _is_plain(text: str) -> bool:
    return (
        not re.search(r"(?<![A-Za-z\\])[A-Za-z]|\\(?:alpha|beta|theta|pi)(?![A-Za-z])", text)
        or read_number(text) is not None
    )


def _in_radians(text: str) -> str:
    if text.endswith("\\degree"):
        return "\\frac{\\pi}{180}\\cdot " + text.removesuffix("\\degree")
    return text


def _equal_times(gold: str, gold_times: int, answer: str, times: int) -> bool:
    if gold_times == times:
        return algebra.equal(gold, answer)
    one, two = read_number(gold), read_number(answer)
    if one is None or two is None:
        return False
    return same_number(
        Number(one.value * gold_times, one.digits), Number(two.value * times, two.digits)
    )


def _same_percent(gold: str, gold_unit: str | None, answer: str, unit: str | None) -> bool:
    """`0.05` is `5%`, and a value without a percent sign is not multiplied."""
    if {gold_unit, unit} != {None, "percent"}:
        return False
    one, two = read_number(gold), read_number(answer)
    if one is None or two is None:
        return False
    hundredth = [
        Fraction(1, 100) if name == "percent" else Fraction(1) for name in (gold_unit, unit)
    ]
    return same_number(
        Number(one.value * hundredth[0], one.digits), Number(two.value * hundredth[1], two.digits)
    )


_BASE = re.compile(r"([0-9A-F]+)\s*_\s*\{?\s*(?:\\text\{)?\s*(\d+|[a-z]+)\s*\}?\}?")
_BASES = {
    "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
    "nine": "9",
    "ten": "10", "twelve": "12", "sixteen": "16", "binary": "2", "bin": "2", "hex": "16",
    "oct": "8", "dec": "10",
}  # fmt: skip


def split_base(text: str) -> tuple[str, str | None]:
    """(digits, base) of `1010_2`, `1010_{two}`; the base is None if none is written."""
    if found := _BASE.fullmatch(text):
        return found.group(1), _BASES.get(found.group(2), found.group(2))
    return text, None


def same_text(gold: str, answer: str) -> bool:
    """Letters and digits in one order; one letter alone keeps its case."""
    one, two = (
        re.sub(r"\\text\s*|[^A-Za-z0-9+\-]|^(?:the|an?) ", "", text) for text in (gold, answer)
    )
    if any(re.search(r"\\(?!text)|[\^_=<>/*]", text) for text in (gold, answer)):
        return gold == answer
    return bool(one) and (one == two if len(one) == 1 else one.lower() == two.lower())
