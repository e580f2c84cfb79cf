"""The verifier as a scorer of beginnings of responses: whether the answer that a text has is
right.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from megatron_efr.grading.pool import Grader
from megatron_efr.types import Prompt

# one for all: its process is started when first asked, and ends with this one
_grader = cache(Grader)


def verified(prompt: Prompt, texts: Sequence[str]) -> list[float]:
    """For each text the score, 0 or 1, of its last box against the prompt's gold by math-verify; 0
    without a box.
    """
    return [grade.score for grade in _grader().grade(texts, [prompt.gold] * len(texts))]
