"""Goes on if engines are lost, or come back: they get the weights again, and are asked again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megatron_efr import log
from megatron_efr.errors import EngineError, LostError, NoEngineError
from megatron_efr.rollout.engine import Engine

T = TypeVar("T")

RECOVERIES = 3
"""Times that a publication is begun again, if no engine was left that served."""


def recovering(
    ask: Callable[[], T],
    lost: type[EngineError] | tuple[type[EngineError], ...],
    recover: Callable[[EngineError], None],
) -> T:
    """Return the answer of `ask`; if it raises `lost`, `recover` and ask again, at most RECOVERIES
    times.
    """
    for _ in range(RECOVERIES):
        try:
            return ask()
        except lost as error:
            recover(error)
    return ask()


def ask_with_recovery(publish: Callable[[], None], ask: Callable[[], T]) -> T:
    """Publish, and return the answer of `ask`.

    If servers are lost so that it cannot go on, both are called again, at most RECOVERIES times.
    Publishing waits for a server to come back.
    """

    def published_and_asked() -> T:
        publish()
        return ask()

    def say(error: EngineError) -> None:
        log.warning(f"{error}; publishing to those that answer, or come back")

    return recovering(published_and_asked, (LostError, NoEngineError), say)


def take_in_returned(engine: Engine, publish: Callable[[], None]) -> Callable[[], None]:
    """Make a function that publishes if servers that were lost are back, which do not serve before.

    It does so at most RECOVERIES times.
    """
    times = iter(range(RECOVERIES))

    def take_in() -> None:
        if engine.health().get("empty") and next(times, None) is not None:
            publish()

    return take_in
