"""Parts a quantity from its unit: `18 \\text{ dollars}`, `$18`, `5 m/s`, `45\\degree`, `12.5%`;
tables first.
"""

from __future__ import annotations

import re
from functools import lru_cache

# Spellings of one unit. The first is its name here; single letters count only apart from the number
# or in \text{}.
_SPELLINGS = """
percent % percentage pct percents
degree degrees deg ° \\degree
$ dollar dollars usd us$ bucks
cent cents ¢
€ euro euros eur
£ pound-sterling gbp quid
¥ yen jpy yuan rmb cny
₹ rupee rupees rs inr
m meter meters metre metres
cm centimeter centimeters centimetre centimetres
mm millimeter millimeters millimetre millimetres
km kilometer kilometers kilometre kilometres
inch inches in
ft foot feet
yd yard yards yds
mile miles mi
s second seconds sec secs
ms millisecond milliseconds
min minute minutes mins
h hour hours hr hrs
day days
week weeks wk wks
month months
year years yr yrs
g gram grams gm
kg kilogram kilograms kgs
mg milligram milligrams
lb lbs
pound pounds
oz ounce ounces
ton tons tonne tonnes
L l liter liters litre litres
mL ml milliliter milliliters
gallon gallons gal
N newton newtons
J joule joules
W watt watts
V volt volts
A ampere amperes amp amps
Hz hertz
Pa pascal pascals
K kelvin
rad radian radians
mph mile/h
km/h kmh kmph kph
am a.m.
pm p.m.
unit units
"""
_NAMES = {
    spelling: line.split()[0]
    for line in _SPELLINGS.strip().splitlines()
    for spelling in line.split()
}
_SINGLE = {name for name in _NAMES if len(name) == 1 and name.isalpha()}
# Words after a number that change it, so that what is before them is not the answer.
_MULTIPLES = {
    "hundred": 10**2, "thousand": 10**3, "k": 10**3, "million": 10**6, "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12, "dozens": 12,
}  # fmt: skip
_CHANGES = """
and or more less not than over under at least most fewer greater above below if except plus minus times by to half
halves third thirds quarter quarters fourth fourths fifths tenths hundredths thousandths squared cubed but modulo mod
remainder base factorial choose is are was equals solution solutions no none between through from positive negative
when where for all any only either both approximately about or so infinity
"""
_CHANGE_WORDS = frozenset(_CHANGES.split())
_PREFIX = re.compile(r"^(-?) ?(?:(?:US|A|C)?\$|€|£|¥|₹|¢|Rs\.?(?= ?\d))\s*(?=[-.\d\\({])")
_PREFIX_UNIT = re.compile(r"€|£|¥|₹|¢|Rs")
_SUFFIX = re.compile(
    r"^(?P<core>.*?[\d)}\]!]|.*?\\(?:pi|infty|[a-zA-Z]*) ?|.*?)\s*(?P<unit>"
    r"%|\\degree(?:\s*\\?(?:text\{)?\s*[CF]\s*\}?)?|[$€£¥₹¢]|"
    r"(?:\\text\{[^{}]*\}[\s/.\\cdot]*(?:\^\s*\{?-?\d\}?)?\s*)+)$"
)
_ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")  # whose degrees are an argument's
_WORDS = re.compile(
    r"^(?P<core>[-+]?(?:[\d.,]|(?<=\d) (?=\d)|\\frac ?\{[^{}]*\} ?\{[^{}]*\}|/(?=\d)|"
    r"\\(?:times|cdot) ?10 ?\^ ?\{?-?\d+\}?|"
    r"\\sqrt ?\{\d+\}|\\pi ?)*(?:[\d}i)]|\\pi))(?P<gap>\s*)"
    r"(?P<unit>[A-Za-z°µ][A-Za-z'.\- ]*(?:\s*(?:/|\bper\b|\^\s*\{?-?\d\}?|\\cdot)\s*[A-Za-z.' \-]*)*)$"
)


@lru_cache(maxsize=16384)
def split_unit(text: str) -> tuple[str, str | None, int]:
    """(what is left, the unit's name or None, the factor that a word such as `million` brings) of
    normalised text.
    """
    # a currency's sign before the number, after its minus
    core = text
    unit = None
    factor = 1
    if found := _PREFIX.match(core):
        mark = _PREFIX_UNIT.search(found.group())
        core = found.group(1) + core[found.end() :]
        unit = _NAMES.get((mark.group().lower() if mark else "$"), "$")
    # a sign, or text in \text{}, behind it; degrees of an angle's function are no unit
    if (
        (found := _SUFFIX.match(core))
        and found.group("core").strip()
        and not _ANGLE.search(found.group("core"))
    ):
        name, times = _unit_name(found.group("unit"), apart=True)
        if name is None:
            return text, None, 1
        core = found.group("core").strip()
        unit = _join(unit, name)
        factor = times
    elif found := _WORDS.match(core):
        # bare words behind it: a single letter counts only after a gap
        name, times = _unit_name(found.group("unit"), apart=bool(found.group("gap")))
        if name is None:
            return text, None, 1
        core = found.group("core").strip()
        unit = _join(unit, name)
        factor = times
    # `50% of the students`: the sign goes with the words
    if unit is not None and core.endswith("%"):
        core = core[:-1].strip()
    return core, unit or None, factor


def _join(first: str | None, second: str) -> str:
    return second if not first or first == second else first if not second else f"{first} {second}"


def same_unit(gold: str | None, answer: str | None) -> bool:
    """Equal units, or one that is not written; of two free texts one may say more (`eggs`, `eggs
    per day`).
    """
    if gold is None or answer is None or gold == answer:
        return True
    one = gold.split()
    two = answer.split()
    known = [
        any(word.strip("^/0123456789") in _NAMES.values() for word in words) for words in (one, two)
    ]
    return not any(known) and (set(one) <= set(two) or set(two) <= set(one))


def _unit_name(text: str, apart: bool) -> tuple[str | None, int]:
    """(canonical name or None if `text` is no unit, factor). `apart`: a space or \\text{} stands
    before it.
    """
    plain = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).replace("{", "").replace("}", "")
    plain = (
        plain.replace("\\degree", " degree ").replace("\\cdot", " ").replace("\\", " ").strip(" .,")
    )
    if plain in _NAMES and (apart or plain not in _SINGLE):
        return _NAMES[plain], 1
    plain = re.sub(r"\s*\^\s*", "^", re.sub(r"\s*/\s*", " / ", plain))
    words = [word.strip(".,") for word in plain.replace("-", " ").split()]
    factor = 1
    while words and words[0].lower() in _MULTIPLES and (apart or len(words[0]) > 1):
        factor *= _MULTIPLES[words.pop(0).lower()]
    if any(word.lower() in _CHANGE_WORDS for word in words):
        return None, 1
    if not apart and words and len(words[0].split("^")[0]) == 1 and "^" not in words[0]:
        return None, 1  # `5t` is a product
    if any(
        len(base) == 1 and base.isalpha() and base not in _SINGLE
        for base in (w.split("^")[0] for w in words)
    ):
        return None, 1  # `5 x` and `\\pi r^2` too
    return " ".join(_canonical(words)), factor


def _canonical(words: list[str]) -> list[str]:
    """Names of the table, powers as `^2`, `per` as a slash, plural endings off."""
    result: list[str] = []
    power = ""
    for word in words:
        lower = word.lower()
        if lower in ("square", "sq", "squared"):
            power = "^2"
            continue
        if lower in ("cubic", "cu"):
            power = "^3"
            continue
        if lower in ("per", "/"):
            result.append("/")
            continue
        if lower in ("a", "an", "the", "of"):
            continue
        base, _, exponent = word.partition("^")
        name = _NAMES.get(base) or _NAMES.get(base.lower()) or _singular(base.lower())
        result.append(name + (f"^{exponent}" if exponent else power))
        power = ""
    return " ".join(result).replace(" / ", "/").split()


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
