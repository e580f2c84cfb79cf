"""Reads the JSON object that a file holds, or says in a sentence why it holds none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_efr.config.section import ConfigError
from megatron_efr.errors import UserError


def read_object(path: Path, refusal: type[UserError] = ConfigError) -> dict[str, Any]:
    """The JSON object that a file holds; `refusal` if it cannot be read as one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    # UnicodeDecodeError and JSONDecodeError are ValueErrors
    except (ValueError, RecursionError) as error:
        raise refusal(f"{path}: not valid JSON: {error}") from error
    except OSError as error:
        raise refusal(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(found, dict):
        raise refusal(f"{path}: a JSON object is required, found {type(found).__name__}")
    return found
