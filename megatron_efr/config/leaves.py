"""Flat keys of a tree of sections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def leaves(key: str, value: Any, *, within_lists: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf of a section: `method`, {name: laser} ->
    (method.name, laser).

    An empty section is a leaf, and so is a list; `within_lists`, lists of sections are walked by
    index.
    """
    if isinstance(value, Mapping) and value:
        inner = [(str(name), each) for name, each in value.items()]
    elif (
        within_lists
        and isinstance(value, list)
        and any(isinstance(item, Mapping) for item in value)
    ):
        inner = [(str(index), each) for index, each in enumerate(value)]
    else:
        yield key, value
        return
    for name, each in inner:
        yield from leaves(f"{key}.{name}" if key else name, each, within_lists=within_lists)
