"""The base of every section of the configuration."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from megatron_efr.errors import UserError


class ConfigError(UserError):
    """A configuration that cannot run. The message names the key's path, the value and what would
    be right.
    """


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, types are not coerced."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    def changed(self, key: str) -> bool:
        """True if a value is another than its default."""
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    def refuse_idle(self, section: str, keys: Sequence[str], reason: str) -> None:
        """Refuse the first of these keys that is changed, since it has no effect for this `reason`:
        ValueError.
        """
        for key in filter(self.changed, keys):
            raise ValueError(
                f"{section}.{key}: {getattr(self, key)!r} has no effect {reason}; leave it out"
            )
