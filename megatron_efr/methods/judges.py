"""A judge of the steps of a thought: a third party's function, found by name and held to what it
has to return.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

from megatron_efr.config import ConfigError
from megatron_efr.config.plugins import load_function
from megatron_efr.types import Prompt

Judge = Callable[[Prompt, Sequence[str]], Sequence[float]]
"""Score each step of a thought, 0 to 1, from the problem with its gold answer and the steps."""

GROUP = "megatron_efr.judges"
"""The entry points of third parties' judges."""

KEY = "method.judge"


@lru_cache(maxsize=16)
def judge_of(name: str) -> Judge:
    """The judge of that name, or module:function; ConfigError if it cannot be loaded, or has
    another signature.
    """
    return load_function(name, GROUP, KEY, ("prompt", "steps"))


def scores(name: str, prompt: Prompt, steps: Sequence[str]) -> list[float]:
    """The judge's scores of a prompt's `steps`; ConfigError, with the prompt, for what is no number
    from 0 to 1.
    """
    judge = judge_of(name)
    try:
        made = [float(score) for score in judge(prompt, list(steps))]
    except Exception as error:  # anything may happen in a function of somebody else
        raise ConfigError(
            f"{KEY}: {name} failed on prompt {prompt.id}: {type(error).__name__}: {error}; it has "
            "to return a number from 0 to 1 for each step"
        ) from error
    if len(made) != len(steps):
        raise ConfigError(
            f"{KEY}: {name} returned {len(made)} scores for the {len(steps)} steps of a response "
            f"to prompt {prompt.id}"
        )
    for number, score in enumerate(made, start=1):
        if not (math.isfinite(score) and 0.0 <= score <= 1.0):
            raise ConfigError(
                f"{KEY}: {name} returned {score} for step {number} of a response to prompt "
                f"{prompt.id}, and a score is a number from 0 to 1"
            )
    return made
