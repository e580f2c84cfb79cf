"""Plain rules as functions: who was right and how long each response is in, rewards out."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_efr.config import ConfigError, RolloutConfig
from megatron_efr.config.file import validate
from megatron_efr.methods.plain import Outcomes, Plain
from megatron_efr.methods.registry import METHODS, find
from megatron_efr.types import FloatArray


def rewards(
    name: str,
    correct: npt.ArrayLike,
    lengths: npt.ArrayLike,
    *,
    truncated: npt.ArrayLike | None = None,
    answered: npt.ArrayLike | None = None,
    max_new_tokens: int | None = None,
    **options: Any,
) -> FloatArray:
    """Rewards that method `name` gives the responses of one prompt, float64 [samples].

        methods.rewards("efr", [1, 0, 1], [300, 900, 500], alpha=0.2)

    correct: right answers, [samples], true or false, 1 or 0. lengths: generated tokens, integers
    above 0, [samples]. truncated: responses that were cut off, [samples]; they count as wrong, and
    as not answered. answered: responses that hold an answer, right or wrong, [samples]; by default
    all that were not cut off. max_new_tokens: the most tokens of a response, which some methods
    take for a limit that is not set. options: the method's own, as in the section `method` of a
    configuration.

    ConfigError for an unknown method, a wrong option, options that make no sense together or with
    the limit, and a method whose rewards need more than this. ValueError for arrays that do not fit
    together.
    """
    # only a plain rule needs no more than this
    kind = find(name)
    if not issubclass(kind, Plain):
        plain = ", ".join(sorted(name for name, each in METHODS.items() if issubclass(each, Plain)))
        raise ConfigError(
            f"{name}: its rewards need more than who was right and how long; plain methods are "
            f"{plain}"
        )
    # arrays as asked for, with the defaults of those that are left out
    tokens = _lengths(lengths)
    right = _flags("correct", correct, tokens)
    cut = _flags("truncated", truncated, tokens, default=np.zeros(len(tokens), dtype=bool))
    found = _flags("answered", answered, tokens, default=~cut)
    if max_new_tokens is not None and tokens.max() > max_new_tokens:
        raise ValueError(
            f"lengths: {tokens.max():g} tokens, and max_new_tokens is {max_new_tokens}"
        )
    # the rule, then what it says to the limit
    method = validate(kind, options, prefix=name)
    made = method.rule(Outcomes(right & ~cut, tokens, cut, found & ~cut, max_new_tokens))
    method.check(RolloutConfig(samples=len(tokens), max_new_tokens=max_new_tokens or sys.maxsize))
    return made


def _lengths(lengths: npt.ArrayLike) -> FloatArray:
    given = np.asarray(lengths)
    if given.ndim != 1 or not given.size:
        raise ValueError(
            f"lengths: of shape {list(given.shape)}; give one number of tokens per response, "
            "[samples]"
        )
    if not np.issubdtype(given.dtype, np.number) or np.iscomplexobj(given):
        raise ValueError(f"lengths: of type {given.dtype}; give integers")
    if not np.all((given > 0) & (given == np.floor(given)) & np.isfinite(given)):
        raise ValueError(f"lengths: {given.tolist()}; numbers of tokens are integers above 0")
    return given.astype(np.float64)


def _flags(
    name: str,
    values: npt.ArrayLike | None,
    tokens: FloatArray,
    default: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.bool_]:
    if values is None and default is not None:
        return default
    given = np.asarray(values)
    if given.shape != tokens.shape:
        raise ValueError(
            f"{name}: of shape {list(given.shape)}, and lengths has {list(tokens.shape)}"
        )
    if not np.all((given == 0) | (given == 1)):
        raise ValueError(f"{name}: {given.tolist()}; give true or false, 1 or 0, for each response")
    return given.astype(bool)
