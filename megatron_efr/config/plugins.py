"""Third parties' classes and functions by name: found when they are asked for, loaded, and
checked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from megatron_efr.config.section import ConfigError

Kind = TypeVar("Kind")


def find_class(
    name: str, ours: Mapping[str, type[Kind]], group: str, base: type[Kind], section: str
) -> type[Kind]:
    """The class of that name, ours or an installed third party's of the entry points `group`.

    ConfigError, under `section`.name, if there is none, or if a third party's does not load or is
    no `base`.
    """
    if name in ours:
        return ours[name]
    others = registered(group)
    if name not in others:
        raise ConfigError(
            f"{section}.name: no {section} {name!r}; there are "
            f"{', '.join(sorted({*ours, *others}))}"
        )
    return load_plugin(others[name], base, f"{section}.name")


def registered(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group by name, not loaded."""
    return {entry.name: entry for entry in entry_points(group=group)}


def load_plugin(entry: EntryPoint, base: type[Kind], key: str) -> type[Kind]:
    """The class that an entry point names; ConfigError, under the key that asks for it, if it is no
    `base`.
    """
    named = f"{key}: {entry.name}, which is registered as {entry.value}"
    try:
        found = entry.load()
    except (Exception, SystemExit) as error:  # anything may happen in a module of somebody else
        raise ConfigError(f"{named}, cannot be loaded: {type(error).__name__}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(
            f"{named}, is no subclass of {base.__module__.rpartition('.')[0]}.{base.__name__}"
        )
    return found


def load_function(name: str, group: str, key: str, arguments: Sequence[str]) -> Callable[..., Any]:
    """The third party's function that `name` leads to: an entry point of `group`, or
    module:function.

    ConfigError, under the key that asks for it, if there is none, if it cannot be imported, or if
    it cannot be called with these positional arguments.
    """
    # a registered name, or a path: both have the grammar of entry points
    others = registered(group)
    if name not in others and ":" not in name:
        there = ", ".join(sorted(others)) or "none"
        raise ConfigError(
            f"{key}: no {name!r}; registered under {group}: {there}; or give module:function"
        )
    entry = others.get(name) or EntryPoint(name, name, group)
    if not entry.pattern.match(entry.value):
        raise ConfigError(
            f"{key}: {name} is no module:function; write it as Python imports it, such as "
            "my_package.judges:judge"
        )
    # imported before the run starts, since its first use may be hours away
    try:
        found = entry.load()
    except (Exception, SystemExit) as error:  # anything may happen in a module of somebody else
        raise ConfigError(
            f"{key}: {name} cannot be imported: {type(error).__name__}: {error}; install its "
            "package, or put its folder on PYTHONPATH"
        ) from error
    # the call is tried on its signature alone: nothing of it runs yet
    wanted = f"a function of ({', '.join(arguments)})"
    if not callable(found):
        raise ConfigError(f"{key}: {name} is of type {type(found).__name__}; {wanted} is required")
    try:
        inspect.signature(found).bind(*arguments)
    except TypeError as error:
        raise ConfigError(f"{key}: {name} is not {wanted}: {error}") from error
    except ValueError:  # some functions in C have no signature
        pass
    return found
