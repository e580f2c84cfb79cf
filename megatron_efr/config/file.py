"""Reading a configuration: YAML and overrides in, a checked section out, and sentences for what is
wrong.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from megatron_efr.config import ConfigError, RunConfig
from megatron_efr.config.yaml_text import decoded, parse

ConfigT = TypeVar("ConfigT", bound=RunConfig)


def load(kind: type[ConfigT], path: str | Path, overrides: Iterable[str] = ()) -> ConfigT:
    """Read `path` as a `kind`, with `section.key=value` overrides applied; ConfigError says what is
    wrong and where.
    """
    tree = read_tree(path)
    for override in overrides:
        apply(tree, override)
    return validate(kind, tree, str(path))


def read_tree(path: str | Path) -> dict[str, Any]:
    """The sections of a YAML file, not yet checked against a kind of configuration; ConfigError if
    it has none.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    tree = parse(decoded(data, str(path)), str(path))
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise ConfigError(f"{path}: expected a mapping of sections, found {found}; see examples/")
    return tree


SectionT = TypeVar("SectionT", bound=BaseModel)


def validate(
    kind: type[SectionT], tree: dict[str, Any], source: str = "", prefix: str = ""
) -> SectionT:
    """Check `tree` against `kind`; `prefix` is the path of `tree` within the whole configuration,
    `source` its file.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        place = f"{source}: " if source else ""
        raise ConfigError(
            "\n".join(_sentence(kind, problem, place, prefix) for problem in error.errors())
        ) from error


def dump(config: BaseModel) -> str:
    """The resolved configuration as YAML: it runs again from there."""
    return yaml.safe_dump(
        config.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True
    )


def apply(tree: dict[str, Any], override: str) -> None:
    """Set the value of an override `section.key=value` in `tree`; ConfigError if it is none, or has
    no place there.
    """
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{override!r}: an override reads section.key=value")
    put(tree, key, parse(text, repr(override), key, "the value is not valid YAML"), override)


def put(tree: dict[str, Any], key: str, value: Any, override: str = "") -> None:
    """Set `section.key` in `tree`, a section as a whole; a ConfigError names the `override` that
    asked for it.
    """
    override = override or key
    *path, last = key.split(".")
    node: Any = tree
    for name in path:
        if isinstance(node, dict):
            if node.get(name) is None:  # a section that the file leaves out, or leaves empty
                node[name] = {}
            node = node[name]
        else:
            node = node[_index(node, name, override)]
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


def _sentence(kind: type[BaseModel], problem: Any, place: str, prefix: str) -> str:
    location = [part for part in problem["loc"] if not str(part).startswith("function-")]
    parts = [prefix, *location] if prefix else location
    where = ".".join(map(str, parts))
    value = problem.get("input")
    if problem["type"] == "extra_forbidden":
        known = _keys_at(kind, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = (
            f"did you mean {near[0]}?" if near else f"known keys here: {', '.join(sorted(known))}"
        )
        return f"{place}{where}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{place}{where}: required, and not set"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("model_type", "model_attributes_type"):
        return f"{place}{where}: a section of keys belongs here, not {_shown(value)}"
    if isinstance(value, dict):
        return (
            f"{place}{message}"
            if not where or message.startswith(f"{where}.")
            else f"{place}{where}: {message}"
        )
    return f"{place}{where}: {message} (got {_shown(value)})"


def _shown(value: Any) -> str:
    """A value of the file as a message quotes it."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


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
