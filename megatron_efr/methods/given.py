"""Checks what a method needs against what a run has: refuses, by name, what is not there."""

from __future__ import annotations

from typing import NamedTuple

from megatron_efr.config import ConfigError
from megatron_efr.methods.base import Needs
from megatron_efr.types import Marks


class Given(NamedTuple):
    """A run's means: its engine and what that can do, marks around a thought, iterations."""

    engine: str
    abilities: frozenset[str]
    marks: Marks | None
    iterations: int


def check_given(name: str, needs: Needs, given: Given) -> None:
    """Refuse, with a ConfigError, method `name`, whose `needs` go beyond what is given."""
    if missing := sorted(needs.engine - given.abilities):
        can = ", ".join(sorted(given.abilities)) or "none of what a method may need"
        raise ConfigError(
            f"rollout.engine: {given.engine} cannot do what method {name} needs "
            f"({', '.join(missing)}); it can: {can}"
        )
    if needs.offline and given.iterations > 1:
        raise ConfigError(
            f"train.iterations: {given.iterations}, and method {name} learns from the starting "
            "model's responses alone; set it to 1, with all prompts in it (rollout.prompts), and "
            "train.updates to those of one pass"
        )
    if needs.thinking and given.marks is None:
        raise ConfigError(
            f"model.thinking.closes: method {name} has to tell a thought from its answer, and "
            "this model's tokenizer has no </think> that is one token and stays in the text of a "
            "response; name the text that closes a thought"
        )
