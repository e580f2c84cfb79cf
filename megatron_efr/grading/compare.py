"""Compares a gold answer with a given one, form by form; if two readings are sensible the gold's
form decides.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

from megatron_efr.grading import algebra
from megatron_efr.grading.algebra import UnreadableError
from megatron_efr.grading.forms import EMPTY, REALS, Form, read
from megatron_efr.grading.normalise import normalise
from megatron_efr.grading.numbers import read_decimal_comma, read_number, same_number
from megatron_efr.grading.options import option
from megatron_efr.grading.quantities import same_quantity, same_text, split_base
from megatron_efr.grading.regions import Interval, region
from megatron_efr.grading.units import split_unit


def same_answer(gold: str, answer: str) -> bool:
    """True if `answer` says what `gold` says; UnreadableError if it is no answer of any form."""
    one, two = normalise(gold), normalise(answer)
    if one == two:
        return True
    if letter := option(one):
        given = option(two)
        return given is not None and given[0] == letter[0]
    form = read(gold)
    for plain, comma in ((one, two), (two, one)):
        number = read_number(plain)
        other = read_decimal_comma(comma)
        if number and other and "." in plain and (comma is two or len(comma.partition(",")[2]) > 1):
            return same_number(number, other)
    if (given := option(two)) and given[1]:  # the value after its letter: `(C) 5`
        return same(form, read(given[1]))
    return same(form, read(answer))


@lru_cache(maxsize=16384)
def is_answer(gold: str) -> bool:
    """True if `gold` can be an answer: every part of it is words or reads as mathematics."""
    if read_number(gold) or option(normalise(gold)):
        return True
    try:
        return bool(gold.strip()) and _readable(read(gold))
    except (UnreadableError, RecursionError):
        return False


def count_parts(gold: str) -> int:
    """Number of values in a gold answer: parts of a list, set or pair, named values; else 1."""
    form = read(gold)
    several = form.kind in ("list", "set") or (form.kind == "group" and form.left == "(")
    return max(1, len(form.items)) if several else 1


def _readable(form: Form) -> bool:
    if form.items:
        return all(map(_readable, form.items))
    if form.kind == "expression" and form.text != "\\dots":
        algebra.parse(split_base(split_unit(form.text)[0])[0])
    return bool(form.text)


def same(gold: Form, answer: Form) -> bool:
    """True if two forms are equal."""
    if gold.text == answer.text and gold.kind == answer.kind:
        return True
    if answer.kind == "named" and gold.kind not in ("named", "relation", "list"):
        return _same_unnamed(gold, answer.items[0])
    if gold.kind == "named":
        return _same_named(gold, answer)
    chain = answer.kind == "relation" and set(answer.signs) <= _CHAINED
    if chain and gold.kind not in ("relation", "union", "group"):
        return _same_as_chain(gold, answer)
    compare = _KINDS[gold.kind]
    return compare(gold, answer)


_CHAINED = {"=", "\\approx"}


def _same_unnamed(gold: Form, value: Form) -> bool:
    """`gold` against what stands after `x =`."""
    if value.kind == "relation" and gold.kind not in ("relation", "union", "group"):
        return _same_as_chain(gold, value, named=True)
    return same(gold, value)


def _same_named(gold: Form, answer: Form) -> bool:
    if answer.kind == "named":
        value = gold.items[0]
        while value.kind == "relation" and set(value.signs) == {"="}:
            value = value.items[-1]
        return gold.name == answer.name and _same_unnamed(value, answer.items[0])
    if answer.kind == "relation" and set(answer.signs) == {"="}:
        return _same_equation(
            Form("relation", gold.text, (read(gold.name), gold.items[0]), signs=("=",)), answer
        )
    if answer.kind == "list" and answer.name == "\\pm":
        return False
    return same(gold.items[0], answer)


def _same_as_chain(gold: Form, answer: Form, named: bool = False) -> bool:
    """A value against `a = b = c` or `a \\approx b`.

    The end of the first counts, if what it says is true or it begins with a name (`x = 5 + 6 =
    11`). Of the second, the exact side counts, and against a decimal gold the last as well.
    """
    if not set(answer.signs) <= _CHAINED:
        return False
    items = list(map(_value, answer.items))
    if "\\approx" in answer.signs:
        before = answer.signs.index("\\approx")
        exact = "." not in gold.text
        return same(gold, items[before]) or (not exact and same(gold, items[-1]))
    return (named or not _contradicts(items)) and same(gold, items[-1])


def _contradicts(items: list[Form]) -> bool:
    """True if a chain of equalities, such as `3 = 5`, holds two constants that differ."""
    return any(
        _constant(one) and _constant(two) and not _equal_quantity(one, two)
        for one, two in pairwise(items)
    )


def _constant(form: Form) -> bool:
    if form.kind != "expression":
        return False
    try:
        parsed = algebra.parse(split_unit(form.text)[0])
    except UnreadableError:
        return False
    return not getattr(parsed, "free_symbols", {1})


def _equal_quantity(one: Form, two: Form) -> bool:
    return algebra.equal(split_unit(one.text)[0], split_unit(two.text)[0])


def _same_expression(gold: Form, answer: Form) -> bool:
    if answer.kind == "words":
        count = _COUNTS.get(answer.text.lower())
        return same_text(gold.text, answer.text) or (count is not None and same(gold, read(count)))
    if answer.kind == "congruence":
        return same(gold, answer.items[0])
    if answer.kind == "set" and gold.text != EMPTY and len(answer.items) == 1:
        return same(gold, answer.items[0])
    if answer.kind == "ratio":
        return _ratio_value(answer) is not None and algebra.equal(
            gold.text, _ratio_value(answer) or ""
        )
    if answer.kind == "group" and len(answer.items) == 1 and answer.left == "[":
        return same(gold, answer.items[0])
    if answer.kind == "list" and gold.text.replace(" ", "") == answer.text.replace(" ", ""):
        return read_number(gold.text) is not None and "," in gold.text  # `58,500` against `58, 500`
    if answer.kind != "expression":
        return gold.text == REALS and _same_region(gold, answer)
    return same_quantity(gold.text, answer.text)


_NUMERALS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty
"""
_COUNTS = {name: str(number) for number, name in enumerate(_NUMERALS.split())}


def _same_words(gold: Form, answer: Form) -> bool:
    if answer.kind == "list" and all(
        item.kind == "words" and len(item.text) == 1 for item in answer.items
    ):
        return gold.text == "".join(item.text for item in answer.items)
    if answer.kind in ("words", "expression"):
        return same_text(gold.text, answer.text)
    return False


def _same_list(gold: Form, answer: Form) -> bool:
    if gold.items[0].kind == "relation" and _same_region(gold, answer):
        return True
    names = [item.name for item in gold.items if item.kind == "named"]
    distinct = len(set(names)) == len(gold.items)
    if answer.kind == "named":  # `(p, q) = (5, 8)` or `x = 1, 2` read elsewhere
        answer = answer.items[0]
    if answer.kind == "words" and gold.ordered:
        return _same_words(answer, gold)
    if answer.kind == "relation" and set(answer.signs) == {"\\in"}:
        answer = answer.items[1]
    if answer.kind == "set" or (answer.kind == "list" and not (gold.ordered or distinct)):
        return same_unordered(gold.items, answer.items)
    if answer.kind == "list":
        if distinct and all(item.kind == "named" for item in answer.items):
            return same_unordered(gold.items, answer.items)
        return same_ordered(gold.items, answer.items)
    if answer.kind == "group" and distinct and answer.left == "(":
        return same_ordered(gold.items, answer.items)
    return False


def same_ordered(gold: tuple[Form, ...], answer: tuple[Form, ...]) -> bool:
    return len(gold) == len(answer) and all(
        _same_item(one, two) for one, two in zip(gold, answer, strict=True)
    )


def same_unordered(gold: tuple[Form, ...], answer: tuple[Form, ...]) -> bool:
    """True if each part of one has its own equal in the other; a part given twice counts once."""
    gold, answer = _distinct(gold), _distinct(answer)
    if len(gold) != len(answer):
        return False
    left = list(answer)
    for item in gold:
        index = next((i for i, other in enumerate(left) if _same_item(item, other)), None)
        if index is None:
            return False
        left.pop(index)
    return True


def _distinct(items: tuple[Form, ...]) -> tuple[Form, ...]:
    return tuple({(item.kind, item.text.replace(" ", "")): item for item in items}.values())


def _same_item(gold: Form, answer: Form) -> bool:
    if gold.kind == "list":  # `p = 5, q = 2; p = 7, q = 2`
        gold = replace(
            gold,
            kind="group",
            left="(",
            right=")",
            items=tuple(_value(item) for item in gold.items),
        )
    if answer.kind == "list":
        answer = replace(
            answer,
            kind="group",
            left="(",
            right=")",
            items=tuple(_value(item) for item in answer.items),
        )
    return same(gold, answer)


def _value(form: Form) -> Form:
    return form.items[0] if form.kind == "named" else form


def _same_set(gold: Form, answer: Form) -> bool:
    if answer.kind == "relation" and answer.signs == ("\\in",):
        answer = answer.items[1]
    if answer.kind in ("set", "list"):
        if gold.ordered:
            return same_ordered(gold.items, answer.items)
        return same_unordered(tuple(map(_value, gold.items)), tuple(map(_value, answer.items)))
    return len(gold.items) == 1 and answer.kind == "expression" and same(gold.items[0], answer)


def _same_group(gold: Form, answer: Form) -> bool:
    if answer.kind == "relation":
        pair = gold.left == "(" and gold.right == ")" and "\\infty" not in gold.text
        return not pair and _same_region(gold, answer)
    if answer.kind == "list":
        flat = (gold.left, gold.right) == ("(", ")") or (gold.left == "[" and len(gold.items) > 2)
        return (
            flat
            and answer.name != "\\pm"
            and same_ordered(gold.items, tuple(map(_value, answer.items)))
        )
    if answer.kind == "group":
        return (gold.left, gold.right) == (answer.left, answer.right) and same_ordered(
            gold.items, answer.items
        )
    if answer.kind == "expression" and "matrix" in answer.text:
        return False
    return len(gold.items) == 1 and same(gold.items[0], answer)


def _same_difference(gold: Form, answer: Form) -> bool:
    """Of two sets: as numbers if both are, or part by part."""
    pairs = gold.kind == answer.kind and same_ordered(gold.items, answer.items)
    return pairs or _same_region(gold, answer)


def _same_cases(gold: Form, answer: Form) -> bool:
    """Each case has its own equal, value and condition."""
    return answer.kind == "cases" and same_unordered(gold.items, answer.items)


def _same_region(gold: Form, answer: Form) -> bool:
    """Intervals, unions and inequalities of one variable as sets of numbers."""
    one, two = region(gold), region(answer)
    if one is None or two is None or (one[0] and two[0] and one[0] != two[0]):
        return False
    left = list(two[1])
    if len(one[1]) != len(left):
        return False
    for piece in one[1]:
        index = next((i for i, other in enumerate(left) if _same_interval(piece, other)), None)
        if index is None:
            return False
        left.pop(index)
    return True


def _same_interval(one: Interval, two: Interval) -> bool:
    return all(a[1] == b[1] and same(a[0], b[0]) for a, b in zip(one, two, strict=True))


def _same_relation(gold: Form, answer: Form) -> bool:
    if answer.kind == "relation" and set(gold.signs) == set(answer.signs) == {"="}:
        return _same_equation(gold, answer)
    if answer.kind == "named" and gold.signs == ("=",):
        return _same_equation(
            gold, Form("relation", "", (read(answer.name), answer.items[0]), signs=("=",))
        )
    if answer.kind == "named" and "\\in" not in gold.signs:
        return False
    if _same_region(gold, answer):
        return True
    if answer.kind != "relation":
        closing = gold.items[-1]
        only_values = set(gold.signs) == {"="} and _chain_of_values(gold)
        return only_values and same(closing, answer)
    return _same_chain(gold, answer)


def _chain_of_values(form: Form) -> bool:
    """`|AB| = 1`, `A:B = 1`, `\\frac{NO}{BO} = 1`: a quantity by its value, not an equation in
    variables.
    """
    first = form.items[0].text
    return bool(re.search(r"[A-Z]{2}|:|\||\\angle|_", first)) and _constant(form.items[-1])


_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}


def _same_chain(gold: Form, answer: Form) -> bool:
    """Chains of relations part by part, also read backwards; a single one also up to a factor."""
    for items, signs in (
        (answer.items, answer.signs),
        (answer.items[::-1], tuple(_FLIPPED.get(sign, sign) for sign in reversed(answer.signs))),
    ):
        if signs == gold.signs and same_ordered(gold.items, items):
            return True
    if len(gold.signs) != 1 or len(answer.signs) != 1:
        return False
    one, two = _directed(gold), _directed(answer)
    return one[0] == two[0] and algebra.proportional(one[1], two[1], signed=one[0] != "\\ne")


def _directed(form: Form) -> tuple[str, tuple[str, str]]:
    sign = form.signs[0]
    left, right = form.items
    if sign in (">", "\\ge"):
        return _FLIPPED[sign], (right.text, left.text)
    return sign, (left.text, right.text)


def _same_equation(gold: Form, answer: Form) -> bool:
    if len(gold.items) == len(answer.items) == 2:
        one, two = ((form.items[0].text, form.items[1].text) for form in (gold, answer))
        if same_ordered(gold.items, answer.items) or same_ordered(gold.items, answer.items[::-1]):
            return True
        return algebra.proportional(one, two, signed=False)
    return same(gold.items[-1], answer.items[-1])


def _same_congruence(gold: Form, answer: Form) -> bool:
    if answer.kind != "congruence" or (gold.name and answer.name and gold.name != answer.name):
        return False
    numbers = [read_number(item.text) for form in (gold, answer) for item in form.items]
    if any(number is None for number in numbers):
        return same_ordered(gold.items, answer.items)
    residue, modulus, other, other_modulus = (number.value for number in numbers if number)
    return modulus == other_modulus and modulus != 0 and (residue - other) % modulus == 0


def _same_ratio(gold: Form, answer: Form) -> bool:
    if answer.kind == "ratio":
        if len(gold.items) != len(answer.items):
            return False
        if _clock(gold) and (_clock(answer) or _ratio_value(gold) is None):
            return same_ordered(gold.items, answer.items)
        first, other = gold.items[0].text, answer.items[0].text
        return all(
            algebra.equal(f"({one.text})\\cdot ({other})", f"({two.text})\\cdot ({first})")
            for one, two in zip(gold.items[1:], answer.items[1:], strict=True)
        )
    value = _ratio_value(gold)
    return value is not None and answer.kind == "expression" and algebra.equal(value, answer.text)


def _clock(form: Form) -> bool:
    """True if a ratio may be a time of day: `7:32`, `12:30:00`."""
    return _TIME.fullmatch(form.text) is not None


_TIME = re.compile(r"(?:[01]?\d|2[0-4])(?: ?: ?[0-5]\d){1,2}(?: ?[apAP]\.?[mM]\.?)?")


def _ratio_value(form: Form) -> str | None:
    """The fraction a ratio of two stands for; none for a clock's time that would reduce, or divide
    by 0.
    """
    if len(form.items) != 2:
        return None
    one, two = (read_number(item.text) for item in form.items)
    if one is None or two is None or two.value == 0:
        return None
    if _clock(form) and (one.value / two.value).denominator != two.value:
        return None
    value = one.value / two.value
    return (
        f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
        if value.denominator != 1
        else str(value.numerator)
    )


_KINDS = {
    "expression": _same_expression,
    "words": _same_words,
    "list": _same_list,
    "set": _same_set,
    "group": _same_group,
    "union": _same_region,
    "difference": _same_difference,
    "cases": _same_cases,
    "relation": _same_relation,
    "congruence": _same_congruence,
    "ratio": _same_ratio,
}
