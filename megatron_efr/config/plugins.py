"""Third parties' classes by entry point: found by name, loaded when they are asked for, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from megatron_efr.config.section import ConfigError

Kind = TypeVar("Kind")


def find_class(name: str, ours: Mapping[str, type[Kind]], group: str, base: type[Kind], section: str) -> type[Kind]:
    """The class of that name, ours or an installed third party's of the entry points `group`.

    ConfigError, under `section`.name, if there is none, or if a third party's does not load or is no `base`.
    """
    if name in ours:
        return ours[name]
    others = registered(group)
    if name not in others:
        raise ConfigError(f"{section}.name: no {section} {name!r}; there are {', '.join(sorted({*ours, *others}))}")
    return load_plugin(others[name], base, f"{section}.name")


def registered(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group by name, not loaded."""
    return {entry.name: entry for entry in entry_points(group=group)}


def load_plugin(entry: EntryPoint, base: type[Kind], key: str) -> type[Kind]:
    """The class that an entry point names; ConfigError, under the key that asks for it, if it is no `base`."""
    named = f"{key}: {entry.name}, which is registered as {entry.value}"
    try:
        found = entry.load()
    except Exception as error:  # anything may happen in a module of somebody else
        raise ConfigError(f"{named}, cannot be loaded: {type(error).__name__}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{named}, is no subclass of {base.__module__.rpartition('.')[0]}.{base.__name__}")
    return found
