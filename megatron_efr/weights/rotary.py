"""Reads config.json's rope fields as transformers 5 does, or refuses them and names the field to
change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_efr.config import ConfigError
from megatron_efr.weights.fields import Fields

DEFAULT_THETA = 10000.0  # of every supported model type if config.json names none


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary position embeddings: their base, and how it is scaled beyond the positions that were
    trained first.

    `kind` is transformers' rope_type. Queries and keys are both multiplied by `attention_factor`.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0  # Llama 3's band between scaled and untouched frequencies
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # YaRN's band, in turns over the original positions
    beta_slow: float = 1.0
    truncate: bool = True  # YaRN's band ends at whole dimensions
    attention_factor: float = 1.0
    # config.json's, and not the one that follows from YaRN's factor
    own_attention_factor: bool = False

    def reach(self, max_positions: int) -> int:
        """Positions of the model: YaRN's factor extends the original ones, whatever the limit."""
        return (
            max(max_positions, int(self.factor * self.original_positions))
            if self.kind == "yarn"
            else max_positions
        )


def read_rotary(raw: dict[str, Any], where: str) -> Rotary:
    """Read `rope_parameters` (transformers 5's field) or `rope_scaling` (the older one) with
    `rope_theta`.

    `where` is what messages say before a key. ConfigError for a type that is not computed, or a
    field without meaning.
    """
    given = [key for key in ("rope_scaling", "rope_parameters") if _section(raw, key, where)]
    read = [_read(raw, key, where) for key in given] or [_read(raw, None, where)]
    if len(read) == 1 or read[0] == read[1]:
        return read[0]
    scaling, parameters = read
    if scaling.theta == parameters.theta and parameters.kind == "default":
        return scaling
    raise ConfigError(
        f"{where}rope_scaling: given beside rope_parameters, and transformers reads rope_scaling "
        f"alone: rope_type {scaling.kind} with rope_theta {scaling.theta:g}, in place of "
        f"{parameters.kind} with {parameters.theta:g}; put its fields into rope_parameters, "
        "beside the rope_theta there, and take rope_scaling out"
    )


def _section(raw: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    found = raw.get(key)
    if found is not None and not isinstance(found, dict):
        raise ConfigError(f"{where}{key}: an object or null is required, found {found!r}")
    return found or {}


def _read(raw: dict[str, Any], section: str | None, where: str) -> Rotary:
    """The embedding that transformers makes of one of the fields (None: of neither) and what stands
    beside it.
    """
    rope = Fields(dict(raw[section]) if section else {}, f"{where}{section}." if section else where)
    theta = rope if "rope_theta" in rope else Fields(raw, where)
    if rope.values.pop("partial_rotary_factor", 1) not in (1, None):
        raise rope.refusal("partial_rotary_factor", "is not supported; supported: 1")
    kind = (
        rope.values.get("rope_type", rope.values.get("type", "default")) if section else "default"
    )
    if not isinstance(kind, str) or kind not in _KINDS:
        raise rope.refusal(
            "rope_type" if "rope_type" in rope else "type",
            f"{kind!r} is not supported; supported: "
            f"{', '.join(_KINDS)}{_WHY_NOT.get(str(kind), '')}",
        )
    known, read = _KINDS[kind]
    if section and (
        unknown := sorted(rope.values.keys() - {"rope_type", "type", "rope_theta", *known})
    ):
        raise rope.refusal(unknown[0], f"is not known for rope_type {kind!r}; take it out")
    return Rotary(
        theta=theta.number(
            "rope_theta", None if "rope_theta" in theta else DEFAULT_THETA, above=1.0
        ),
        kind=kind,
        **read(rope, Fields(raw, where)),
    )


def _default(rope: Fields, config: Fields) -> dict[str, Any]:
    return {}


def _linear(rope: Fields, config: Fields) -> dict[str, Any]:
    return {"factor": _factor(rope)}


def _llama3(rope: Fields, config: Fields) -> dict[str, Any]:
    factor = _factor(rope)
    low = rope.number("low_freq_factor")
    return {
        "factor": factor,
        "original_positions": _original(rope, config),
        "low_freq_factor": low,
        "high_freq_factor": rope.number("high_freq_factor", above=low),
    }


def _yarn(rope: Fields, config: Fields) -> dict[str, Any]:
    factor = _factor(rope)
    slow = rope.number("beta_slow", 1.0)
    fast = rope.number("beta_fast", 32.0)
    if fast < slow:
        raise rope.refusal("beta_fast", f"{fast:g} is less than beta_slow {slow:g}")
    both = [
        rope.number(key) for key in ("mscale", "mscale_all_dim") if rope.values.get(key) is not None
    ]
    over, under = both if len(both) == 2 else (1.0, 0.0)  # one alone counts for nothing
    return {
        "factor": factor,
        "original_positions": _original(rope, config),
        "beta_fast": fast,
        "beta_slow": slow,
        "truncate": rope.flag("truncate", True),
        "own_attention_factor": rope.values.get("attention_factor") is not None,
        "attention_factor": rope.number(
            "attention_factor", _mscale(factor, over) / _mscale(factor, under)
        ),
    }


def _mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0  # Peng et al. 2023 (YaRN), section 3.4


def _factor(rope: Fields) -> float:
    factor = rope.number("factor")
    if factor < 1:
        raise rope.refusal("factor", f"a number of at least 1 is required, found {factor:g}")
    return factor


def _original(rope: Fields, config: Fields) -> int:
    key = "original_max_position_embeddings"
    return rope.count(key) if key in rope else config.count("max_position_embeddings")


# rope_type -> its fields, and how they are read
_KINDS: dict[str, tuple[set[str], Callable[[Fields, Fields], dict[str, Any]]]] = {
    "default": (set(), _default),
    "linear": ({"factor"}, _linear),
    "llama3": ({"factor", "original_max_position_embeddings", "low_freq_factor",
        "high_freq_factor"}, _llama3),
    "yarn": (
        {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate",
            "attention_factor",
         "mscale", "mscale_all_dim"},
        _yarn,
    ),
}  # fmt: skip
_WHY_NOT = {
    "dynamic": (
        " (dynamic depends on the longest sequence of a batch; up to max_position_embeddings it "
        "is default)"
    ),
    "longrope": " (longrope depends on the longest sequence of a batch)",
}
