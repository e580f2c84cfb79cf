"""Reads plain numbers exactly, and compares them: exact with exact, a decimal to the digits it
writes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

SIGNIFICANT = 6  # digits to which a decimal must be right at least, however few it writes

_MOST_DIGITS = 4000
_MOST_EXPONENT = 4000
_UNSIGNED = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?: \d{3})+|\d+)?(?:\.\d*)?"
_DECIMAL = re.compile(rf"([+-]?) ?({_UNSIGNED})")
_SCIENTIFIC = re.compile(
    rf"([+-]?) ?({_UNSIGNED}) ?(?:[eE]([+-]?\d+)|(?:\\times|\\cdot) ?10 ?\^ ?\{{? ?([+-]?\d+) ?\}}?)"
)
_FRACTION = re.compile(
    r"([+-]?) ?(\d+)? ?\\frac ?\{ ?([+-]?)(\d+) ?\} ?\{ ?([+-]?)(\d+) ?\}|([+-]?) ?(\d+) ?/ ?(\d+)|"
    r"([+-]?) ?\{(\d+)\} ?/ ?\{(\d+)\}"
)
_REPEATING = re.compile(
    r"([+-]?) ?(\d*)\.(\d*?)(?:\\(?:overline|bar|dot|widebar) ?\{?(\d+)\}?|\((\d+)\)|(\d+?)\6{1,} ?\\dots)"
)
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")


@dataclass(frozen=True, slots=True)
class Number:
    """A rational number, and the significant digits it was written with if it is a decimal (None:
    exact).
    """

    value: Fraction
    digits: int | None = None


@lru_cache(maxsize=16384)
def read_number(text: str) -> Number | None:
    """The number that normalised `text` writes in digits, or None: 1,234 · 1 234 · .5 ·
    2\\frac{1}{2} · 3/4 · 1e-5.
    """
    if len(text) > _MOST_DIGITS or not any(character.isdigit() for character in text):
        return None
    if found := _DECIMAL.fullmatch(text):
        return _decimal(found.group(1), found.group(2))
    if found := _FRACTION.fullmatch(text):
        return _fraction(found)
    if found := _SCIENTIFIC.fullmatch(text):
        exponent = int(found.group(3) or found.group(4))
        plain = (
            _decimal(found.group(1), found.group(2)) if abs(exponent) <= _MOST_EXPONENT else None
        )
        return plain and Number(plain.value * Fraction(10) ** exponent, plain.digits)
    if found := _REPEATING.fullmatch(text):
        return _repeating(found)
    return None


def read_decimal_comma(text: str) -> Number | None:
    """`3,14` as 3.14: an answer in the habit of most of Europe; None if the comma groups
    thousands.
    """
    return (
        read_number(text.replace(",", "."))
        if _DECIMAL_COMMA.fullmatch(text) and not read_number(text)
        else None
    )


def _sign(text: str) -> int:
    return -1 if text == "-" else 1


def _decimal(sign: str, text: str) -> Number | None:
    plain = text.replace(",", "").replace(" ", "")
    if not plain.strip("."):
        return None
    value = _sign(sign) * Fraction(plain if not plain.endswith(".") else plain[:-1])
    if "." not in plain:
        return Number(value)
    return Number(value, max(1, len(plain.replace(".", "").lstrip("0"))))


def _fraction(found: re.Match[str]) -> Number | None:
    sign, whole, over_sign, over, under_sign, under = found.group(1, 2, 3, 4, 5, 6)
    if over is None:
        sign, over, under = (
            (found.group(7), found.group(8), found.group(9))
            if found.group(8)
            else found.group(10, 11, 12)
        )
        over_sign = under_sign = ""
    if int(under) == 0 or (whole and (over_sign or under_sign)):
        return None
    value = Fraction(int(over), int(under)) * _sign(over_sign) * _sign(under_sign) + int(whole or 0)
    return Number(_sign(sign) * value)


def _repeating(found: re.Match[str]) -> Number:
    sign, whole, fixed = found.group(1, 2, 3)
    period = found.group(4) or found.group(5) or found.group(6)
    start = Fraction(int(f"{whole}{fixed}" or 0), 10 ** len(fixed))
    return Number(
        _sign(sign) * (start + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed)))
    )


def same_number(gold: Number, answer: Number) -> bool:
    """Exact against exact is exact; a decimal is right if rounding (or, from 6 digits on, cutting)
    the other gives it.

    Both are then looked at to as many significant digits as the shorter decimal writes, and 6 at
    least.
    """
    if gold.value == answer.value:
        return True
    written = [number for number in (gold, answer) if number.digits is not None]
    if not written:
        return False
    short = min(written, key=lambda number: number.digits or 0)
    other = answer.value if short is gold else gold.value
    return agrees(short, other)


def agrees(decimal: Number, exact: Fraction) -> bool:
    """True if `decimal` is `exact` to the digits it writes, and to 6 significant ones at least."""
    if exact == 0 or decimal.value == 0 or (exact > 0) != (decimal.value > 0):
        return exact == decimal.value
    written = decimal.digits or 0
    unit = Fraction(10) ** (magnitude(decimal.value) - max(SIGNIFICANT, written) + 1)
    excess = abs(exact) - abs(decimal.value)
    return abs(excess) * 2 <= unit or (written >= SIGNIFICANT and 0 <= excess < unit)


def magnitude(value: Fraction) -> int:
    """The power of ten of the first significant digit of a value that is not 0."""
    over = abs(value.numerator)
    under = value.denominator
    guess = len(str(over)) - len(str(under))
    return guess if over * 10 ** max(0, -guess) >= under * 10 ** max(0, guess) else guess - 1
