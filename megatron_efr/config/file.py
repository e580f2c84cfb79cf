"""Reading a configuration: YAML and overrides in, a checked section out, and sentences for what is wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from megatron_efr.config import ConfigError, RunConfig

ConfigT = TypeVar("ConfigT", bound=RunConfig)


def load(kind: type[ConfigT], path: str | Path, overrides: Iterable[str] = ()) -> ConfigT:
    """Read `path` as a `kind`, with `section.key=value` overrides applied; ConfigError says what is wrong and where."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    return validate(kind, tree, str(path))


SectionT = TypeVar("SectionT", bound=BaseModel)


def validate(kind: type[SectionT], tree: dict[str, Any], source: str, prefix: str = "") -> SectionT:
    """Check `tree` against `kind`; `prefix` is the path of `tree` within the whole configuration."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(kind, problem, source, prefix) for problem in error.errors())) from error


def dump(config: BaseModel) -> str:
    """The resolved configuration as YAML: it runs again from there."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as a string; people who set a learning rate mean a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$|^[-+]?(?:\d+\.\d*|\.\d+)$|^[-+]?\.inf$|^\.nan$", re.IGNORECASE),
    list("-+0123456789."),
)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: an override reads section.key=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not valid YAML: {error}") from error
    *path, last = key.split(".")
    node: Any = tree
    for name in path:
        node = node.setdefault(name, {}) if isinstance(node, dict) else node[_index(node, name, override)]
        if not isinstance(node, dict | list):
            raise ConfigError(f"{override!r}: {name} is a value, not a section")
    if isinstance(node, dict):
        node[last] = value
    else:
        node[_index(node, last, override)] = value


def _index(items: list[Any], name: str, override: str) -> int:
    """The place in a list that part `name` of an override's key means."""
    if name.isdigit() and int(name) < len(items):
        return int(name)
    places = f"its places are 0 to {len(items) - 1}" if items else "it is empty"
    raise ConfigError(f"{override!r}: {name} is not a place in that list; {places}")


def _sentence(kind: type[BaseModel], problem: Any, source: str, prefix: str) -> str:
    location = [part for part in problem["loc"] if not str(part).startswith("function-")]
    where = ".".join(str(part) for part in ([prefix] if prefix else []) + location)
    value = problem.get("input")
    if problem["type"] == "extra_forbidden":
        known = _keys_at(kind, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys here: {', '.join(sorted(known))}"
        return f"{source}: {where}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{source}: {where}: required, and not set"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(value, dict):
        return f"{source}: {where + ': ' if where else ''}{message}"
    return f"{source}: {where}: {message} (got {value!r})"


def _keys_at(kind: type[BaseModel], location: list[Any]) -> list[str]:
    """The field names of the section that `location` leads to."""
    section: Any = kind
    for part in location:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        if field is None:
            return []
        section = _section_of(field.annotation)
        if section is None:
            return []
    return [field.alias or name for name, field in section.model_fields.items()]


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section_of(inner)
        if found is not None:
            return found
    return None
