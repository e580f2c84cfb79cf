"""Goes on with an evaluation whose servers are lost, or come back: publishes the weights to them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megatron_efr import log
from megatron_efr.rollout.engine import Engine
from megatron_efr.weights.publish import RECOVERIES, LostError, NoEngineError

T = TypeVar("T")


def ask_with_recovery(publish: Callable[[], None], ask: Callable[[], T]) -> T:
    """Publish, and return the answer of `ask`.

    If servers are lost so that it cannot go on, both are called again, at most RECOVERIES times. Publishing waits for
    a server to come back.
    """
    for _ in range(RECOVERIES):
        try:
            publish()
            return ask()
        except (LostError, NoEngineError) as error:
            log.warning(f"{error}; publishing to those that answer, or come back")
    publish()
    return ask()


def take_in_returned(engine: Engine, publish: Callable[[], None]) -> Callable[[], None]:
    """Make a function that publishes if servers that were lost are back, which do not serve before.

    It does so at most RECOVERIES times.
    """
    times = iter(range(RECOVERIES))

    def take_in() -> None:
        if engine.health().get("empty") and next(times, None) is not None:
            publish()

    return take_in
