"""Megatron's own configurations, made from ours: what Megatron refuses in them is said before any
rank joins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from megatron_efr.config import ConfigError
from megatron_efr.config.passed_on import check_passed_on

MegatronT = TypeVar("MegatronT")


def made(
    kind: type[MegatronT], fields: Mapping[str, Any], where: str, given: Mapping[str, Any]
) -> MegatronT:
    """Megatron's dataclass `kind` of `fields` and, over them, those of the configuration's section
    `where`.

    ConfigError for a key that it does not have, a value of another type, or a combination that it
    refuses.
    """
    owner = f"{kind.__name__} of megatron-core"
    taken = check_passed_on(where, given, _annotations(kind), owner)
    try:
        return kind(**{**fields, **taken})
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        NotImplementedError,
        TypeError,
        ValueError,
    ) as error:
        raise ConfigError(
            f"{where}: {owner} refuses this: {error or type(error).__name__}"
        ) from error


def _annotations(kind: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}
