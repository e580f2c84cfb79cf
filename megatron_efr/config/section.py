"""The base of every section of the configuration."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from megatron_efr.errors import UserError


class ConfigError(UserError):
    """A configuration that cannot run. The message names the key's path, the value and what would
    be right.
    """


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, types are not coerced."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
