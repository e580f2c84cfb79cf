"""Scripts by name: made from a configuration, written as JSON and read again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_efr.config import ConfigError, Section
from megatron_efr.config.file import validate
from megatron_efr.scripts.exits import Exits
from megatron_efr.scripts.kinds import Budget, EarlyExit, Forks, Opened, Plain
from megatron_efr.scripts.modes import LessThinking, SummaryThinking, ZeroThinking
from megatron_efr.scripts.probed import Concise, Deer, EarlyStop, Subthoughts
from megatron_efr.scripts.published import (
    S1,
    CutOff,
    Elastic,
    NoThinking,
    Sketch,
    ThinkFor,
    Tip,
    Told,
)
from megatron_efr.scripts.rounds import Rounds
from megatron_efr.scripts.search import VgSearch
from megatron_efr.types import Prompt, Request, Script

SCRIPTS: dict[str, type[Any]] = {
    "plain": Plain,
    "opened": Opened,
    "budget": Budget,
    "early_exit": EarlyExit,
    "forks": Forks,
    "exits": Exits,
    "rounds": Rounds,
    "cut_off": CutOff,
    "no_thinking": NoThinking,
    "zero_thinking": ZeroThinking,
    "less_thinking": LessThinking,
    "summary_thinking": SummaryThinking,
    "elastic": Elastic,
    "s1": S1,
    "deer": Deer,
    "early_stop": EarlyStop,
    "subthoughts": Subthoughts,
    "concise": Concise,
    "tip": Tip,
    "vg_search": VgSearch,
    "told": Told,
    "think_for": ThinkFor,
    "sketch": Sketch,
}
"""Every kind and published rule, a frozen `Section` that is a `Script`, by the name that a
configuration and a journal give it.
"""


def plain(prompt: Prompt, samples: int, seed: int) -> Request:
    """Ask for `samples` responses, each drawn at once."""
    return Request(prompt, seed, (Plain(),) * samples)


def build(name: str, options: Mapping[str, Any], path: str) -> Script:
    """The script of that name; ConfigError, with the key's path, for an unknown name or a wrong
    option.
    """
    if name not in SCRIPTS:
        raise ConfigError(f"{path}.name: no script {name!r}; there are {', '.join(SCRIPTS)}")
    kind: type[Section] = SCRIPTS[name]
    made: Any = validate(kind, dict(options), prefix=path)
    return made


def encode(script: Script) -> dict[str, Any]:
    """Name and options, JSON-ready."""
    names = {kind: name for name, kind in SCRIPTS.items()}
    if type(script) not in names or not isinstance(script, Section):
        raise ConfigError(
            f"script {type(script).__name__}: it has no name; add its kind, a Section, to SCRIPTS"
        )
    return {"name": names[type(script)], **script.model_dump(mode="json")}


def decode(tree: Mapping[str, Any]) -> Script:
    """The script that `encode` wrote. ConfigError if its kind is not known here, or has other
    options.
    """
    options = dict(tree)
    return build(options.pop("name"), options, "script")
