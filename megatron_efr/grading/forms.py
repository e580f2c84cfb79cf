"""Reads normalised text as a form: words, an expression, a list, a set, an interval, named values,
a relation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from megatron_efr.grading.normalise import normalise
from megatron_efr.grading.numbers import read_number

RELATIONS = ("<", ">", "\\le", "\\ge", "\\ne", "\\in", "\\approx", "=")
EMPTY = "\\emptyset"
REALS = "\\mathbb{R}"


@dataclass(frozen=True, slots=True)
class Form:
    """One reading of an answer; `text` is what was read.

    kind: expression (mathematics without parts) · words · list (parts without brackets: `ordered`
    if their order counts) · set · group (parts between the brackets `left`, `right`) · named
    (`name` = items[0]) · relation (items joined by `signs`) · union (items) · difference (of two
    sets) · cases (groups of value and condition) · congruence (items: residue, modulus) · ratio
    (items).
    """

    kind: str
    text: str
    items: tuple[Form, ...] = ()
    name: str = ""
    left: str = ""
    right: str = ""
    signs: tuple[str, ...] = ()
    ordered: bool = False


@lru_cache(maxsize=16384)
def read(text: str) -> Form:
    """The form of an answer as people write it."""
    return _read(normalise(text))


_LETTERS = re.compile(r"[A-Za-z]+(?:(?:[ .']|(?<=[A-Za-z]{2})-(?=[A-Za-z]{2})|\. )[A-Za-z]+)*[.?]?")
_LABEL = re.compile(r"[A-Za-z]{3,}(?: [A-Za-z]+)* \d+")  # `Player 2`
# `xy` is a product, `on` is not
_ALGEBRA = re.compile(r"[a-z]|[a-c]{2}|[k-np-tv-z]{2,3}|[a-z] [a-z]")


def _read(text: str) -> Form:
    if read_number(text):
        return Form("expression", text)
    if meaning := _PHRASES.get(text.lower()):
        return Form("expression", meaning)
    if is_words(text):
        return _words(text)
    return _cases(text) or _parts(text) or _single(text)


_PHRASES = {
    **dict.fromkeys(
        ("no solution", "no solutions", "no real solution", "no real solutions",
            "there is no solution",
         "there are no solutions", "empty set", "the empty set", "emptyset", "\\{\\}", EMPTY),
        EMPTY,
    ),
    **dict.fromkeys(
        ("all real numbers", "all reals", "all real x", "the set of all real "
            "numbers", "the real numbers", "reals"),
        REALS,
    ),
}  # fmt: skip


def is_words(text: str) -> bool:
    """True if letters are all there is, and not those of a product such as `xy`."""
    plain = text.replace("\\text{", "").replace("}", "") if "\\text{" in text else text
    if not _LETTERS.fullmatch(plain.strip()):
        return _LABEL.fullmatch(plain.strip()) is not None
    return "\\text{" in text or not _ALGEBRA.fullmatch(plain.strip())


def _words(text: str) -> Form:
    plain = re.sub(r"\s+", " ", text.replace("\\text{", "").replace("}", "")).strip()
    for joint in (" and ", " or "):
        if joint in plain:
            items = tuple(
                Form("words", part.strip()) for part in plain.split(joint) if part.strip()
            )
            return Form("list", plain, items)
    return Form("words", plain)


_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_AND = re.compile(r"(?:,\s*)?(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|\\text\{\s*,?\s*(?:and|or)\s*\}")


def _parts(text: str) -> Form | None:
    """A list without brackets: split at `;`, else at commas and the words and, or."""
    for separator in (re.compile(";"), _AND, re.compile(r",")):
        pieces = [piece.strip() for piece in split(text, separator, keep=_THOUSANDS)]
        if len(pieces) == 1:
            continue
        pieces = [piece for piece in pieces if piece]
        if len(pieces) < 2:
            return _read(pieces[0]) if pieces and pieces[0] != text else None
        items = [_read(piece) for piece in pieces]
        if separator is _AND:
            items = [
                part for item in items for part in (item.items if item.kind == "list" else (item,))
            ]
        return _list(text, items)
    return None


def _list(text: str, items: list[Form]) -> Form:
    """Flatten ±; the first name holds for the rest (`x = 1, 2`); words and sequences with dots keep
    their order.
    """
    flat: list[Form] = []
    for item in items:
        flat.extend(item.items if item.kind == "list" and item.name == "\\pm" else (item,))
    if flat[0].kind == "named" and all(item.kind in ("expression", "group") for item in flat[1:]):
        name = flat[0].name
        flat = [flat[0], *(Form("named", item.text, (item,), name=name) for item in flat[1:])]
    ordered = all(item.kind == "words" for item in flat) or any(
        item.text == "\\dots" for item in flat
    )
    return Form("list", text, tuple(flat), ordered=ordered)


def _single(text: str) -> Form:
    """A form without list separators at its top."""
    # signs that bind least are looked for first, and the parts are read on their own
    if found := _CONGRUENCE.fullmatch(text):
        residue = found.group(1)
        if (sides := split(residue, re.compile(r"\\equiv(?![A-Za-z])|="))) and len(sides) == 2:
            return Form(
                "congruence",
                text,
                (_read(sides[1].strip()), _read(found.group(2))),
                name=_name(sides[0]),
            )
        return Form("congruence", text, (_read(residue.strip()), _read(found.group(2))))
    if relation := _relation(text):
        return relation
    # sets made of sets
    pieces = split(text, re.compile(r"\\cup(?![A-Za-z])"))
    if len(pieces) > 1:
        return Form("union", text, tuple(_read(piece.strip()) for piece in pieces))
    pieces = split(text, re.compile(r"\\setminus(?![A-Za-z])|(?<=\})\s*-(?=\s*\\\{)"))
    if len(pieces) == 2:
        return Form("difference", text, tuple(_read(piece.strip()) for piece in pieces))
    # a ratio, brackets, and two values in one; else plain mathematics
    sides = split(text, re.compile(":"))
    if len(sides) > 1 and all(side.strip() for side in sides):
        return Form("ratio", text, tuple(_read(side.strip()) for side in sides))
    if bracketed := _bracketed(text):
        return bracketed
    if "\\pm" in text or "\\mp" in text:
        up, down = _signs(text)
        return Form("list", text, (_read(up), _read(down)), name="\\pm")
    return Form("expression", text)


_CASES = re.compile(r"\\begin\{cases\}(.*)\\end\{cases\}")
_IF = re.compile(r"^\s*(?:if|for|when|where)(?![A-Za-z])")
_ELSE = ("else", "elsewhere", "otherwise")


def _cases(text: str) -> Form | None:
    """A function by cases, each a group of its value and its condition; or a system, which is a
    list.
    """
    found = _CASES.fullmatch(text)
    if found is None or "\\begin" in found.group(1):
        return None
    rows = [
        [cell.strip(" ,.;") for cell in split(row, re.compile("&"))]
        for row in found.group(1).split("\\\\")
    ]
    rows = [row for row in rows if any(row)]
    if any(len(row) != 2 or not all(row) or _RELATION.match(row[1]) for row in rows):
        return _list(text, [_read(" ".join(row).strip()) for row in rows]) if rows else None
    items = (
        Form("group", f"{value} : {where}", (_read(value), _condition(where)), left="if")
        for value, where in rows
    )
    return Form("cases", text, tuple(items))


def _condition(text: str) -> Form:
    """The condition of a case: a relation; if there are words in it, its text."""
    plain = " ".join(_IF.sub("", re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)).split())
    if plain in _ELSE:
        return Form("words", _ELSE[0])
    return Form("words", plain) if _WORD.search(plain) else _read(plain)


_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


_CONGRUENCE = re.compile(
    r"(.+?)\s*[,(]*\s*(?:\\pmod|\\p?bmod|\\mod|\\text\{\s*\(?mod\s*\}|mod)(?![A-Za-z])\s*\(?\{?\s*([^{}()]+?)\s*\}?\)?\)*"
)


def _relation(text: str) -> Form | None:
    # what stands between the signs at the top level
    pieces, signs = [], []
    position = 0
    for start, end in places(text, _RELATION):
        pieces.append(text[position:start].strip())
        signs.append(text[start:end].strip())
        position = end
    if not signs:
        return None
    pieces.append(text[position:].strip())
    # `x = 2` names its value, and `x = 1 \pm 2` names two
    if set(signs) == {"="} and len(pieces) >= 2 and (name := _name(pieces[0])):
        value = _chain(pieces[1:], signs[1:]) if len(pieces) > 2 else _read(pieces[1])
        if value.kind == "list" and value.name == "\\pm":
            items = tuple(Form("named", item.text, (item,), name=name) for item in value.items)
            return Form("list", text, items, name="\\pm")
        return Form("named", text, (value,), name=name)
    # a part is missing: `= 5` is 5 with the name left out
    if not pieces[0] and signs == ["="]:
        return _read(pieces[1])
    if not all(pieces):
        return Form(
            "relation", text, tuple(_read(piece) for piece in pieces if piece), signs=tuple(signs)
        )
    # `x = 0.5 \approx 1/2`: named, and the rest a chain
    if (
        signs[0] in ("=", "\\approx")
        and (name := _name(pieces[0]))
        and set(signs) <= {"=", "\\approx"}
    ):
        return Form("named", text, (_chain(pieces[1:], signs[1:]),), name=name)
    return _chain(pieces, signs)


_RELATION = re.compile(r"\\(?:le|ge|ne|in|approx)(?![A-Za-z])|[<>=]")


def _chain(pieces: list[str], signs: list[str]) -> Form:
    if not signs:
        return _read(pieces[0])
    text = pieces[0] + "".join(
        f" {sign} {piece}" for sign, piece in zip(signs, pieces[1:], strict=True)
    )
    return Form("relation", text, tuple(_read(piece) for piece in pieces), signs=tuple(signs))


_NAME = re.compile(
    r"(?:\\?[A-Za-z]+|\\text ?\{[^{}]*\})(?:_ ?(?:\{[^{}]*\}|[A-Za-z0-9]))?'*(?: ?\([A-Za-z](?:, ?[A-Za-z])*\))?|"
    r"\([A-Za-z](?:_\{?\w+\}?)?(?:, ?[A-Za-z](?:_\{?\w+\}?)?)+\)|\|?[A-Z]{1,4}\|?|\\angle ?[A-Z]{1,3}|"
    r"\\(?:overline|vec|hat|bar|mathbf) ?\{[A-Za-z]+\}"
)


def _name(text: str) -> str:
    """`text` as the name of a value (`x`, `a_1`, `f(x)`, `(x, y)`, `\\text{Area}`), else empty."""
    text = text.strip()
    if ":" in text and all(map(_name, text.split(":"))):
        return ":".join(map(_name, text.split(":")))
    if not _NAME.fullmatch(text) or text in ("\\pi", "e", "i", "\\infty", "\\emptyset"):
        return ""
    return re.sub(r"\\text ?|[\s{}]", "", text)


def _signs(text: str) -> tuple[str, str]:
    up = re.sub(r"\\pm(?![A-Za-z])", "+", re.sub(r"\\mp(?![A-Za-z])", "-", text))
    down = re.sub(r"\\pm(?![A-Za-z])", "-", re.sub(r"\\mp(?![A-Za-z])", "+", text))
    return re.sub(r"^\s*\+\s*|(?<=[{(\[])\s*\+\s*", "", up), down


_BRACKETS = ("\\{", "\\}", "\\langle", "\\rangle", "(", ")", "[", "]")


def _bracketed(text: str) -> Form | None:
    """The whole between one pair of brackets."""
    left = next(
        (mark for mark in ("\\{", "\\langle", "(", "[", "<") if text.startswith(mark)), None
    )
    right = next((mark for mark in ("\\}", "\\rangle", ")", "]", ">") if text.endswith(mark)), None)
    if left is None or right is None or _closes(text) != len(text):
        return None
    inner = text[len(left) : len(text) - len(right)].strip()
    if not inner:
        return None
    pieces = [piece.strip() for piece in split(inner, re.compile("[,;]"))]
    if left == "\\{" and right == "\\}":
        if ":" in inner or "|" in inner:
            return None
        form = _read(inner)
        items = form.items if form.kind == "list" else (form,)
        return Form("set", text, items, ordered=any(item.text == "\\dots" for item in items))
    if len(pieces) == 1:
        if left == "(" and right == ")":
            return _read(inner)
        return Form("group", text, (_read(inner),), left=left, right=right) if left != "<" else None
    if not all(pieces):
        return None
    items = tuple(_read(piece) for piece in pieces)
    left, right = ("(", ")") if left in ("\\langle", "<") else (left, right)
    return Form("group", text, items, left=left, right=right)


def _closes(text: str) -> int:
    """The end of the bracket that opens `text`; brackets of different kinds may close each other
    (`(3,4]`).
    """
    for start, end, depth in _depths(text):
        if depth == 0 and start > 0:
            return end
    return -1


_BRACKET = re.compile(
    r"\\[{}]|\\[lr](?:angle|floor|ceil)(?![A-Za-z])|\\(?:begin|end)\{[a-z]*\}|\\.|[()\[\]{}]"
)
_OPENS = {"(", "[", "{", "\\{", "\\langle", "\\lfloor", "\\lceil"}
_CLOSES = {")", "]", "}", "\\}", "\\rangle", "\\rfloor", "\\rceil"}


def _depths(text: str) -> Iterator[tuple[int, int, int]]:
    """(start, end, depth after it) of every bracket."""
    depth = 0
    for bracket in _BRACKET.finditer(text):
        mark = bracket.group()
        if mark in _OPENS or mark.startswith("\\begin"):
            depth += 1
        elif mark in _CLOSES or mark.startswith("\\end"):
            depth -= 1
        else:
            continue
        yield bracket.start(), bracket.end(), depth


def places(
    text: str, pattern: re.Pattern[str], keep: re.Pattern[str] | None = None
) -> list[tuple[int, int]]:
    """The places at which `pattern` matches outside all brackets, and outside what matches
    `keep`.
    """
    kept = [match.span() for match in keep.finditer(text)] if keep else []
    changes = [(0, 0), *((start, depth) for start, _, depth in _depths(text))]
    found = []
    index = 0
    for match in pattern.finditer(text):
        while index + 1 < len(changes) and changes[index + 1][0] < match.start():
            index += 1
        if changes[index][1] == 0 and not any(start <= match.start() < end for start, end in kept):
            found.append(match.span())
    return found


def split(text: str, pattern: re.Pattern[str], keep: re.Pattern[str] | None = None) -> list[str]:
    """`text` cut at each match of `pattern` outside all brackets."""
    pieces = []
    position = 0
    for start, end in places(text, pattern, keep):
        pieces.append(text[position:start])
        position = end
    return [*pieces, text[position:]]
