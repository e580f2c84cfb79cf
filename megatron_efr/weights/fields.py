"""Reads a JSON object's values by key and type, and refuses by file and key what has another."""

from __future__ import annotations

import math
from typing import Any

from megatron_efr.config import ConfigError


class Fields:
    """The fields of one JSON object; `where` is what messages say before a key: the file, and the
    path within it.
    """

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def count(self, key: str, default: int | None = None, most: int = 2**31) -> int:
        """An integer from 1 to `most`; if it is absent or null, `default`."""
        value = self._given(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refusal(
                key, f"an integer is required, found {self._text(key)}; it counts from 1"
            )
        if value > most:
            raise self.refusal(key, f"{self._text(key)} is more than any model has ({most:,})")
        return value

    def number(self, key: str, default: float | None = None, *, above: float = 0.0) -> float:
        """A finite number greater than `above`; if it is absent or null, `default`."""
        value = self._given(key, default)
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not above < value < math.inf
        ):
            raise self.refusal(
                key, f"a number above {above:g} is required, found {self._text(key)}"
            )
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """`true` or `false`; if it is absent, `default`."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.refusal(key, f"true or false is required, found {self._text(key)}")
        return value

    def refusal(self, key: str, message: str) -> ConfigError:
        """The error that says `message` of `key`."""
        return ConfigError(f"{self.where}{key}: {message}")

    def _given(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None and default is not None else value

    def _text(self, key: str) -> str:
        return repr(self.values.get(key))[:80]
