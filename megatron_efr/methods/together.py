"""A method and an algorithm together: refuses what one of them would do in vain, or undo."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_efr.config import ConfigError
from megatron_efr.methods.base import Choices, Method


def check_together(name: str, method: Method, algorithm: Choices) -> None:
    """Refuse, with a ConfigError, choices of the algorithm that have no effect with method `name`,
    or a wrong one.
    """
    if found := list(_in_vain(name, method, algorithm)):
        raise ConfigError("\n".join(found))
    method.check_algorithm(algorithm)


def _in_vain(name: str, method: Method, algorithm: Choices) -> Iterator[str]:
    # what the method needs, and the algorithm would undo
    if algorithm.dynamic_sampling and method.equal_rewards_teach:
        yield (
            "algorithm.dynamic_sampling: true throws away prompts whose responses are all right, "
            f"and {name} tells those apart by their lengths afterwards; set "
            "algorithm.dynamic_sampling: false"
        )
    # credits are made for one mean over tokens, and count otherwise under another
    if (mean := method.needs.aggregate) is not None and algorithm.aggregate != mean:
        yield (
            f"algorithm.aggregate: {algorithm.aggregate}, and the credits of {name} are made for "
            f"the mean that {mean} takes; set algorithm.aggregate: {mean}"
        )
    # rewards do nothing where a method makes the credits itself
    if type(method).credits is Method.credits:
        return
    own = f"{name} gives credits of its own"
    if algorithm.filters:
        yield (
            f"algorithm.name: {algorithm.name} filters by rewards, and {own}: no effect; take "
            "likelihood"
        )
    if algorithm.truncated == "soft":
        yield (
            f"algorithm.truncated: soft takes from rewards, and {own}: no effect; set "
            "algorithm.truncated: wrong"
        )
    # one response of a prompt has no other
    if algorithm.changed("baseline") and algorithm.baseline != "none":
        yield (
            f"algorithm.baseline: it is taken from rewards, and {own}: it has no effect; leave it "
            "out"
        )
    if algorithm.normalize in ("group", "batch") and algorithm.changed("normalize"):
        yield (
            f"algorithm.normalize: {algorithm.normalize} is of advantages that the algorithm "
            f"makes, and {own}: it has no effect; leave it out"
        )
