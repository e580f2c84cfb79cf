"""How often an evaluation puts up with lost servers, which `tests/engine/test_evaluate.py` loses for real."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_efr.evaluate import answered, taking_in
from megatron_efr.report.records import Record
from megatron_efr.weights.publish import EngineError, LostError, NoEngineError


class Servers:
    """Fails as often as it is told to, whether it is published to or asked."""

    def __init__(self, *failures: Exception | None) -> None:
        self.failures, self.published = iter(failures), 0

    def publish(self) -> None:
        self.published += 1
        self.next()

    def next(self) -> Record:
        if (failure := next(self.failures, None)) is not None:
            raise failure
        return {}

    def health(self) -> dict[str, float]:
        return {"empty": 1.0}


def test_servers_that_are_lost_are_published_to_three_times_more_and_what_they_refuse_is_not_asked_again() -> None:
    gone = NoEngineError("none is left: http://a:1")
    lost = Servers(None, gone, LostError("http://a:1"), None, gone)  # asked, published to, asked
    assert answered(lost.publish, lost.next) == {}
    assert lost.published == 4
    never = Servers(*[None, gone] * 5)
    with pytest.raises(NoEngineError, match="http://a:1"):
        answered(never.publish, never.next)
    assert never.published == 4
    refusing = Servers(EngineError("http://a:1 answered 400"))
    with pytest.raises(EngineError, match="answered 400"):
        answered(refusing.publish, refusing.next)
    assert refusing.published == 1


def test_servers_that_are_back_are_published_to_three_times() -> None:
    servers: Any = Servers()
    take_in = taking_in(servers, servers.publish)
    for _ in range(5):
        take_in()
    assert servers.published == 3
