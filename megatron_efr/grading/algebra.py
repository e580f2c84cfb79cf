"""Compares two expressions: math-verify says yes, and a numeric check in high precision may still
say no.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from megatron_efr.grading.numbers import SIGNIFICANT, Number, read_number, same_number

_DIGITS = 40  # of constants that are compared with a decimal
_CANCELLATION = 400  # digits to which a difference is followed before it counts as 0
# numerators and denominators of the values that variables get
_POINTS = ((7, 11), (13, 5), (17, 23))

_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?!\d)|(?<![\d.])(\d+)\.(?!\d)")
_REPEATING = re.compile(r"\d*\.\d*\\(?:overline|bar|dot) ?\{?\d+\}?")
_PRIMES = re.compile(r"([A-Za-z])('+)")  # the parser drops them: x' would be x
_PERCENT = re.compile(r"(\d+(?:\.\d+)?|\\frac\{[^{}]*\}\{[^{}]*\})\s*%")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_DEGREES = re.compile(
    r"(\d+(?:\.\d+)?|\\frac\{[^{}]*\}\{[^{}]*\}|\([^()]*\)|\{[^{}]*\})\s*\\degree"
)
_LOOSE_DIGITS = re.compile(r"\d\s+\d")
_PROSE = re.compile(
    r"(?<![A-Za-z\\{])(?=[a-zA-Z]*[aeiouAEIOU])[A-Za-z]{4,}(?![A-Za-z}])|\\text\{[^{}]*[A-Za-z]{2,} [^{}]*\}"
)


class UnreadableError(Exception):
    """Text that is no expression."""


@lru_cache(maxsize=8192)
def parse(text: str) -> Any:
    """The sympy object that normalised `text` stands for; UnreadableError when it is no
    expression.
    """
    number = read_number(text)
    if number is not None:
        import sympy

        return sympy.Rational(number.value.numerator, number.value.denominator)
    return _latex(text)


def _latex(text: str) -> Any:
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

    if not text or _PROSE.search(text) or _LOOSE_DIGITS.search(text):
        raise UnreadableError(text)
    try:
        parsed = latex2sympy(
            _spelled(text), is_real=True, normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )  # fmt: skip
    except MemoryError:
        raise
    except Exception as error:  # whatever the parser trips over (recursion, digits without end)
        raise UnreadableError(text) from error
    if not isinstance(parsed, sympy.Basic | sympy.MatrixBase):
        raise UnreadableError(text)
    imaginary = sympy.Symbol("i", real=True)
    if imaginary in parsed.free_symbols:
        parsed = parsed.subs(imaginary, sympy.I)
    return parsed


def _spelled(text: str) -> str:
    """Decimals as exact fractions, degrees in radians under sine and its like, percent as
    hundredths.
    """

    def repeating(match: re.Match[str]) -> str:
        number = read_number(match.group())
        return match.group() if number is None else _fraction(number.value)

    def decimal(match: re.Match[str]) -> str:
        whole, places = (match.group(3), "") if match.group(3) else match.group(1, 2)
        return _fraction(Fraction(int(f"{whole}{places}"), 10 ** len(places)))

    text = _PRIMES.sub(lambda found: f"{found.group(1)}_{{{900 + len(found.group(2))}}}", text)
    text = _REPEATING.sub(repeating, text)
    if "\\degree" in text:
        text = (
            _DEGREES.sub(r"(\\frac{\\pi}{180}\\cdot \1)", text)
            if _TRIGONOMETRY.search(text)
            else text
        )
        text = text.replace("\\degree", "")
    text = _PERCENT.sub(r"\\frac{\1}{100}", text)
    return _DECIMAL.sub(decimal, text)


def _fraction(value: Fraction) -> str:
    return (
        str(value)
        if value.denominator == 1
        else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    )


def decimal_digits(text: str) -> int | None:
    """Significant digits of the shortest decimal written in `text`; None if all is exact."""
    number = read_number(text)
    if number is not None:
        return number.digits
    written = [
        len(f"{m.group(1) or m.group(3)}{m.group(2) or ''}".lstrip("0"))
        for m in _DECIMAL.finditer(_REPEATING.sub("", text))
    ]
    return max(1, min(written)) if written else None


def equal(gold: str, answer: str) -> bool:
    """True if two normalised expressions are equal; UnreadableError if `answer` is none."""
    one, two = read_number(gold), read_number(answer)
    if one is not None and two is not None:
        return same_number(one, two)
    left, right = parse(gold), parse(answer)
    digits = decimal_digits(gold), decimal_digits(answer)
    return _same(left, right, digits)


def _same(left: Any, right: Any, digits: tuple[int | None, int | None]) -> bool:
    import sympy

    if left == right:
        return True
    matrices = [isinstance(side, sympy.MatrixBase | sympy.MatrixExpr) for side in (left, right)]
    if any(matrices):
        return all(matrices) and _same_matrix(left, right, digits)
    plain = [isinstance(side, sympy.Expr) for side in (left, right)]
    if not all(plain):
        return any(plain) is False and _verified(left, right)
    if _names(left) != _names(right) and not (left.free_symbols and right.free_symbols):
        left = left.doit()
        right = right.doit()
        if bool(left.free_symbols) != bool(right.free_symbols):
            left, right = sympy.simplify(left), sympy.simplify(right)
            if bool(left.free_symbols) != bool(right.free_symbols):
                return False
    if digits != (None, None) and not left.free_symbols and not right.free_symbols:
        return _same_value(left, right, digits)
    rational = [side.doit() for side in (left, right)]
    if all(side.is_Rational for side in rational):
        return rational[0] == rational[1]
    return not different(left, right) and _verified(left, right)


def _names(expression: Any) -> set[str]:
    return {symbol.name for symbol in expression.free_symbols}


def _same_matrix(left: Any, right: Any, digits: tuple[int | None, int | None]) -> bool:
    import sympy

    left, right = sympy.Matrix(left.doit()), sympy.Matrix(right.doit())
    if left.shape != right.shape:
        return False
    return all(_same(a, b, digits) for a, b in zip(left.flat(), right.flat(), strict=True))


def _same_value(left: Any, right: Any, digits: tuple[int | None, int | None]) -> bool:
    """Constants of which one at least is a decimal: real and imaginary parts to the digits
    written.
    """
    parts = []
    for side in (left, right):
        value = side.doit().evalf(_DIGITS)
        real, imaginary = value.as_real_imag()
        if not (real.is_Number and imaginary.is_Number and real.is_finite and imaginary.is_finite):
            return False
        parts.append([_rational(real), _rational(imaginary)])
    return all(
        same_number(Number(one, digits[0]), Number(two, digits[1]))
        or abs(one - two) < Fraction(10) ** -(_DIGITS - 5)
        for one, two in zip(*parts, strict=True)
    )


def _rational(value: Any) -> Fraction:
    import sympy

    exact: Any = sympy.Rational(value)
    return Fraction(int(exact.p), int(exact.q))


def different(left: Any, right: Any) -> bool:
    """True if a value of `left` - `right` is known to be other than 0; False says nothing.

    Variables take a few fixed values; cancellation is followed to 400 digits.
    """
    import sympy
    from sympy.core.evalf import PrecisionExhausted

    # by name, so that one pair of answers takes the same values in every process
    symbols = sorted(left.free_symbols | right.free_symbols, key=lambda symbol: symbol.name)
    for over, under in _POINTS if symbols else _POINTS[:1]:
        values = {
            symbol: sympy.Rational(over + 3 * index, under + 2 * index)
            for index, symbol in enumerate(symbols)
        }
        try:
            # few digits are enough to tell from 0; strict, so that a digit said is a digit known
            value = (
                (left.subs(values) - right.subs(values))
                .doit()
                .evalf(5, maxn=_CANCELLATION, strict=True)
            )
        except PrecisionExhausted:
            continue
        except (ArithmeticError, TypeError, ValueError, AttributeError, NotImplementedError):
            return False
        # a value that is no number decides nothing
        if (
            not value.is_number
            or not value.is_finite
            or value.free_symbols
            or value.is_comparable is None
        ):
            return False
        # equal here: the next point may tell them apart
        if value == 0:
            continue
        real, imaginary = value.as_real_imag()
        if real.is_Number and imaginary.is_Number:
            return True
    return False


def _verified(left: Any, right: Any) -> bool:
    """math-verify's own verdict. Its time limit rests on SIGALRM; here the parent process holds the
    clock.
    """
    from math_verify import verify

    return verify([left], [right], float_rounding=SIGNIFICANT, timeout_seconds=None)


def proportional(gold: tuple[str, str], answer: tuple[str, str], signed: bool) -> bool:
    """True if two relations `left ? right` say one thing: their differences' ratio is constant,
    positive if `signed`.

    Without a sign (`=`, `\\ne`) numerators are compared, so that `y = 1/x` is `xy = 1`.
    """
    import sympy

    sides = [parse(left) - parse(right) for left, right in (gold, answer)]
    if not all(isinstance(side, sympy.Expr) for side in sides) or not all(
        side.free_symbols for side in sides
    ):
        return False
    if not signed:
        sides = [sympy.fraction(sympy.together(side.doit()))[0] for side in sides]
    ratio = sympy.simplify(sides[0] / sides[1])
    if ratio.free_symbols or not ratio.is_number or ratio.is_zero or not ratio.is_finite:
        return False
    return not signed or bool(ratio.is_positive)
