"""Holds keys that are handed on to another library to that library's own annotations, before any
work.
"""

from __future__ import annotations

import difflib
import enum
import json
from collections.abc import Mapping
from types import NoneType
from typing import Any, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from megatron_efr.config.section import ConfigError

_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)


def check_passed_on(
    where: str, given: Mapping[str, Any], annotations: Mapping[str, Any], owner: str
) -> dict[str, Any]:
    """The keys of section `where` as `owner` takes them: names of an enumeration's members become
    those members.

    ConfigError for a key that is not in `annotations`, or a value of another type.
    """
    taken = {}
    for key, value in given.items():
        if key not in annotations:
            near = difflib.get_close_matches(key, annotations, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{where}.{key}: {owner} has no such field{hint}")
        annotation = annotations[key]
        members = _members(annotation)
        if isinstance(value, str) and value in members:
            taken[key] = members[value]
        elif members and value is not None:
            raise ConfigError(
                f"{where}.{key}: {owner} takes one of {', '.join(members)}, not {value!r}"
            )
        else:
            try:
                taken[key] = _validated(value, annotation)
            except (ValidationError, PydanticUserError) as error:
                wanted = described(annotation)
                raise ConfigError(
                    f"{where}.{key}: {owner} takes {wanted}, not {value!r}"
                ) from error
    return taken


def _validated(value: Any, annotation: Any) -> Any:
    """A value that YAML can write, as the annotated type: an integer is a float too, and a list
    becomes a tuple.

    Nothing that YAML can write is a function, a dtype, or an object of a class of the library's
    own.
    """
    return TypeAdapter(annotation, config=_STRICT).validate_json(json.dumps(value))


def described(annotation: Any) -> str:
    """A type as its library's documentation writes it."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return text.replace("typing.", "").replace("NoneType", "None")


def _members(annotation: Any) -> dict[str, enum.Enum]:
    """The members of an enumeration, or of an optional one, by name; none for any other type."""
    kinds = [kind for kind in (get_args(annotation) or (annotation,)) if kind is not NoneType]
    if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], enum.Enum):
        return dict(kinds[0].__members__)
    return {}
