"""Keys of a configuration that a resumed run may change, and the sentence if others differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from megatron_efr.config.leaves import leaves
from megatron_efr.errors import UserError

Completed = Callable[[dict[str, Any]], str]
"""Gives a configuration, as a program's own YAML has it, with every key that it lacks at its
default.
"""

MAY_CHANGE = (
    *("runs", "observe", "checkpoint", "evaluation", "train.iterations", "train.max_skipped"),
    *("parallel.wait_limit_s", "data.reference", "train.micro_batch_tokens"),
    *("rollout.urls", "rollout.python", "rollout.timeouts", "rollout.max_new_tokens"),
)
"""Keys, or sections, that a resumed run may set anew. Of micro-batches of another size an update is
the same but for rounding; older versions wrote out a size if none was given.
"""

BENT = {
    "train.iterations": "with optimizer.schedule: constant",
    "rollout.max_new_tokens": "downwards",
}
"""Those that may change under a condition alone."""

_ABSENT = "(not set)"


def refusal(
    config: Path, ours: str, resume: bool, completed: Completed = yaml.safe_dump
) -> str | None:
    """Reason why a run of `ours` (YAML) cannot take the folder of `config`; None if it can.

    It names every key that differs, with both values; or `config` itself, if it is damaged. A key
    that an older version did not know has its default there: `completed` writes it out.
    """
    # a damaged file is no other configuration
    try:
        tree = yaml.safe_load(config.read_bytes())
    except (OSError, yaml.YAMLError) as error:
        return f"{config}: not readable: {error}; put a copy of it back"
    if not isinstance(tree, dict):
        return f"{config}: damaged: no mapping of sections; put a copy of it back"
    # each key as this version knows it, so that new keys make no difference
    with suppress(UserError):  # what this version does not take shows as a difference
        tree = yaml.safe_load(completed(tree))
    held, here = (
        dict(leaves("", each, within_lists=True)) for each in (tree, yaml.safe_load(ours))
    )
    differing = [key for key in dict.fromkeys([*held, *here]) if held.get(key) != here.get(key)]
    refused = [key for key in differing if not (resume and _may_change(key, held, here))]
    if not refused:
        return None
    # every key at once, both values beside each other
    lines = [
        f"  {key}: there {held.get(key, _ABSENT)!r}, here {here.get(key, _ABSENT)!r}\n"
        for key in refused
    ]
    hints = [
        f"{key} may change on resuming, but only {BENT[key]}\n"
        for key in refused
        if resume and key in BENT
    ]
    return (
        f"{config.parent}: already holds another configuration; it differs "
        f"in\n{''.join(lines + hints)}give this run another name (name=...), set these keys as "
        "they are there, or delete the folder"
    )


def _may_change(key: str, held: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    if key == "train.iterations" and held.get("optimizer.schedule", "constant") != "constant":
        return False  # its learning rates follow the number of iterations
    if key == "rollout.max_new_tokens" and ours.get(key, 0) > held.get(key, 0):
        return False  # what is finished was cut off where it might have gone on
    return any(key == allowed or key.startswith(allowed + ".") for allowed in MAY_CHANGE)
