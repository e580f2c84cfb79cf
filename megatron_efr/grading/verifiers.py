"""Verifiers other than math, as a grading process runs them: built-in ones, and plug-ins by name or
module:function.

A verifier is called with (answer, gold) and its options as keywords, and returns a bool, or a score
from 0 to 1. It may have two attributes: `check_gold(gold)`, which returns what is wrong with a gold
answer, or None; and `equal(answer, other)`, which says if two answers are the same one, for votes.
A plug-in may also be a class, which is made once, with the options.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache, partial
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from megatron_efr.grading.normalise import normalise
from megatron_efr.grading.options import option
from megatron_efr.grading.verdict import (
    BAD_GOLD,
    CORRECT,
    CRASH,
    MEMORY,
    UNPARSED,
    WRONG,
    Question,
    Verdict,
    Verifier,
)

ENTRY_POINT = "megatron_efr.verifiers"


class LoadError(Exception):
    """A verifier that cannot be loaded; the message is for people."""


class UnreadableError(ValueError):
    """A text that a built-in verifier cannot read; the message says what it expects."""


# -- built-in
# --------------------------------------------------------------------------------------------------


def exact(answer: str, gold: str, ignore_case: bool = False) -> bool:
    """Compare letter by letter; runs of white space count as one space."""
    ours, theirs = (" ".join(text.split()) for text in (answer, gold))
    return ours.casefold() == theirs.casefold() if ignore_case else ours == theirs


def choice(answer: str, gold: str) -> bool:
    """Compare option letters: `C`, `c`, `(C)`, `C. 5`, `C) five`, `\\text{(C)}`, `Option C` are all
    C.
    """
    return _letter(answer) == _letter(gold)


def numeric(answer: str, gold: str, relative: float = 1e-6, absolute: float = 0.0) -> bool:
    """Compare numbers, exactly but for the tolerance max(absolute, relative x |gold|)."""
    wanted = _number(gold)
    return abs(_number(answer) - wanted) <= max(
        Fraction(absolute), Fraction(relative) * abs(wanted)
    )


def regex(answer: str, gold: str, search: bool = False, ignore_case: bool = False) -> bool:
    """Match the answer with the gold, a regular expression of Python's `re`."""
    pattern = re.compile(gold, re.IGNORECASE if ignore_case else 0)
    return (pattern.search if search else pattern.fullmatch)(answer) is not None


def _letter(text: str) -> str:
    found = option(normalise(text), small=True)
    if found is None:
        raise UnreadableError("no option letter, such as C, (C) or C. text")
    return found[0]


_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d{1,4})?"
_NUMBER = re.compile(rf"([-+]?)({_DIGITS})(?:/({_DIGITS}))?(%?)")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")


def _number(text: str) -> Fraction:
    bare = _FRACTION.sub(r"\1/\2", text).replace("{,}", ",").replace("−", "-").replace("\\", "")
    found = _NUMBER.fullmatch("".join(bare.split()).removeprefix("$").removesuffix("$"))
    if found is None:
        raise UnreadableError("no number, such as -1,234.5, 3/4, 1e-3 or 12%")
    sign, above, below, percent = found.groups()
    try:
        value = Fraction(above.replace(",", "")) / (
            Fraction(below.replace(",", "")) if below else 1
        )
    except (ValueError, ZeroDivisionError) as error:
        raise UnreadableError("no number, such as -1,234.5, 3/4, 1e-3 or 12%") from error
    return (-value if sign == "-" else value) / (100 if percent else 1)


def _check_by(read: Callable[[str], object]) -> Callable[[str], str | None]:
    """A check of golds that must be readable by `read`."""

    def check(gold: str) -> str | None:
        try:
            read(gold)
        except (UnreadableError, re.error) as error:
            return str(error)
        return None

    return check


def _compiles(gold: str) -> None:
    try:
        re.compile(gold)
    except re.error as error:
        raise UnreadableError(f"no regular expression: {error}") from error


class Loaded(NamedTuple):
    """A verifier that can be called, its options bound."""

    verify: Callable[[str, str], Any]
    check_gold: Callable[[str], str | None]
    equal: Callable[[str, str], Any]


# the last: golds are answers
_BUILT_IN: dict[str, tuple[Callable[..., bool], Callable[[str], str | None], bool]] = {
    "exact": (exact, lambda gold: None if gold.strip() else "empty", True),
    "choice": (choice, _check_by(_letter), True),
    "numeric": (numeric, _check_by(_number), True),
    "regex": (regex, _check_by(_compiles), False),
}


# -- loading
# --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def load(name: str, options: str) -> Loaded:
    """The verifier of that name with these options (JSON); LoadError says why it cannot be."""
    given = json.loads(options)
    if name in _BUILT_IN:
        function, check_gold, symmetric = _BUILT_IN[name]
        bound = partial(function, **given)
        return Loaded(bound, check_gold, bound if symmetric else _same_text)
    target = _plugin(name)
    try:
        verify = target(**given) if isinstance(target, type) else _bound(target, given)
    except Exception as error:
        raise LoadError(
            f"verifier {name!r} does not take options {given}: {_named(error)}"
        ) from error
    if not callable(verify):
        raise LoadError(
            f"verifier {name!r}: a {type(verify).__name__}, which cannot be called with (answer, "
            "gold)"
        )
    source = verify if isinstance(target, type) else target
    return Loaded(
        verify,
        getattr(source, "check_gold", lambda gold: None),
        getattr(source, "equal", _same_text),
    )


def _bound(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """`function` with its options; TypeError if it does not take (answer, gold) and these."""
    if callable(function):
        try:
            signature = inspect.signature(function)
        except ValueError:  # some functions in C have none
            signature = None
        if signature is not None:
            signature.bind("", "", **options)
        return partial(function, **options)
    return function


def _plugin(name: str) -> Any:
    """The object that `name` leads to: a registered entry point, or module:function."""
    found = [entry for entry in entry_points(group=ENTRY_POINT) if entry.name == name]
    if not found and ":" not in name:
        registered = (
            ", ".join(sorted({entry.name for entry in entry_points(group=ENTRY_POINT)})) or "none"
        )
        raise LoadError(
            f"no verifier {name!r}; built in: math, {', '.join(_BUILT_IN)}; registered under "
            f"{ENTRY_POINT}: {registered}; or give module:function"
        )
    try:
        if found:
            return found[0].load()
        module, _, path = name.partition(":")
        target: Any = importlib.import_module(module)
        for attribute in path.split("."):
            target = getattr(target, attribute)
        return target
    except (Exception, SystemExit) as error:
        raise LoadError(f"verifier {name!r} cannot be imported: {_named(error)}") from error


def _same_text(answer: str, other: str) -> bool:
    return exact(answer, other)


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


# -- asking
# --------------------------------------------------------------------------------------------------


def ask(question: Question) -> Verdict:
    """The verdict on one question; whatever the verifier raises becomes a status."""
    verifier, gold, answer, kind = question
    try:
        loaded = load(verifier.name, verifier.options)
        if kind == "gold":
            return _bad_gold(loaded, gold) or Verdict(CORRECT)
        try:
            said = (loaded.equal if kind == "equal" else loaded.verify)(answer, gold)
        except (UnreadableError, re.error) as error:
            return _bad_gold(loaded, gold) or Verdict(UNPARSED, None, str(error))
        return _verdict(said, verifier)
    except MemoryError:
        return Verdict(MEMORY)
    except Exception as error:
        return Verdict(CRASH, None, _named(error))


def _bad_gold(loaded: Loaded, gold: str) -> Verdict | None:
    reason = loaded.check_gold(gold)
    return Verdict(BAD_GOLD, None, str(reason)) if reason else None


def _verdict(said: Any, verifier: Verifier) -> Verdict:
    """A verifier's result, as a status and a score."""
    if isinstance(said, bool) or type(said).__name__ in ("bool_", "bool"):  # numpy's too
        return Verdict(CORRECT if said else WRONG)
    try:
        score = float(said)
    except (TypeError, ValueError):
        score = float("nan")
    if not 0.0 <= score <= 1.0:
        return Verdict(
            CRASH,
            None,
            f"returned {said!r:.100}, and a verdict is True, False, or a score from 0 to 1",
        )
    return Verdict(CORRECT if score >= verifier.threshold else WRONG, score)
