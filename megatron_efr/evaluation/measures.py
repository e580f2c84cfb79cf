"""The measures by name.

A figure is the mean over problems of the problem's own mean, so that a problem counts once however
many samples it was given, if a measure does not say otherwise.
"""

from __future__ import annotations

import difflib

from megatron_efr.errors import UserError
from megatron_efr.evaluation import correctness, lengths, thinking
from megatron_efr.evaluation.measure import MEASURES, NUMBERED, Measure
from megatron_efr.evaluation.samples import Samples

PARTS = (correctness, lengths, thinking)
"""The modules that fill the registry."""


def named(name: str) -> Measure:
    """The measure of that name. UserError, with the nearest, for one that is none."""
    base, at, number = name.partition("@")
    if not at and base in MEASURES:
        return MEASURES[base]
    if base in NUMBERED and number.isdecimal():
        return NUMBERED[base](int(number))
    known = {each: each for each in MEASURES} | {each: f"{each}@NUMBER" for each in NUMBERED}
    near = difflib.get_close_matches(base, known, 1)
    said = f"did you mean {known[near[0]]}?" if near else f"there are {', '.join(known.values())}"
    raise UserError(f"measure {name!r}: no such measure; {said}")


def offered(samples: Samples) -> list[Measure]:
    """All measures, some of which these samples may lack what they need for: of those with a number
    pass@k for powers of two, short-m@k for 1 and 3, and hard budgets of a sixteenth to a half of
    the limit.
    """
    fewest = int(samples.sizes.min())
    numbers = {
        "pass": [2**power for power in range(fewest.bit_length())],
        "accuracy_within": sorted({samples.limit // part for part in (16, 8, 4, 2)} - {0}),
        "early": list(samples.budgets),
        "thinking_area": [thinking.OAA_TOKENS],
        "short": [most for most in (1, 3) if most < fewest],
    }
    return [
        *MEASURES.values(),
        *(NUMBERED[base](number) for base in NUMBERED for number in numbers[base]),
    ]
