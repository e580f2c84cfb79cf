"""The publisher's sequence without servers: which publications are checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_efr.errors import EngineError
from megatron_efr.policy.ranks import Ranks
from megatron_efr.publication.publisher import Publisher
from megatron_efr.publication.reshard import Parcel


class Engines:
    """Engines, transport and check at once, which note the version of each publication and of each
    that is checked.
    """

    everywhere = False

    def __init__(self) -> None:
        self.published: list[int] = []
        self.checked: list[int] = []
        self.compared = False
        self.changed = False
        self.refuses = 0  # so many of the next buckets
        self.failing: list[str] = []

    def begin_update(self) -> None:
        self.compared = False

    def prepare(self, parcel: Parcel) -> Parcel:
        return parcel

    def deliver(self, prepared: Parcel) -> None:
        if self.refuses:
            self.refuses -= 1
            raise EngineError("refused")

    def take_failing(self) -> list[str]:
        taken, self.failing = self.failing, []
        return taken

    def checksums(self) -> list[dict[str, str]]:
        return [{"a": "0"}]

    def add(self, parcel: Parcel) -> None:
        assert [name for name, _ in parcel.tensors] == ["a"]

    def compare(self, servers: list[dict[str, str]]) -> None:
        self.compared = True

    def end_update(self, version: int) -> None:
        self.published.append(version)
        if self.compared:
            self.checked.append(version)

    def __getattr__(self, name: str) -> Any:
        if name in ("begin", "finish", "abandon"):
            return lambda: None
        raise AttributeError(name)


class OneTensor:
    """A policy's weights, as far as publishing is concerned."""

    def parcels(self, *, flat: bool, everywhere: bool) -> Iterator[Parcel]:
        yield Parcel([("a", torch.zeros(1))], None)


def make_publisher(engines: Any, ranks: Ranks, every: int) -> Publisher:
    return Publisher(engines, engines, ranks.cpu_world, check=lambda: engines, verify_every=every)


@pytest.mark.parametrize(
    ("every", "checked"), [(1, [*range(1, 10)]), (3, [1, 4, 7]), (4, [1, 5, 9]), (20, [1])]
)
def test_the_first_publication_and_every_nth_is_checked(
    every: int, checked: list[int], ranks: Ranks
) -> None:
    engines = Engines()
    publisher = make_publisher(engines, ranks, every)
    for version in range(1, 10):
        publisher.publish(OneTensor(), version)
    assert engines.published == [*range(1, 10)]
    assert engines.checked == checked


def test_so_is_one_that_takes_in_another_engine_without_putting_off_the_others(
    ranks: Ranks,
) -> None:
    engines = Engines()
    publisher = make_publisher(engines, ranks, 4)
    for version in range(1, 10):
        engines.changed = version in (3, 4)
        publisher.publish(OneTensor(), version)
    assert engines.checked == [1, 3, 4, 5, 9]


def test_what_is_sent_again_counts_once_and_is_checked_as_the_first_attempt_was(
    ranks: Ranks,
) -> None:
    engines = Engines()
    publisher = make_publisher(engines, ranks, 3)
    for version in range(1, 8):
        engines.refuses = 2 if version in (2, 4) else 0
        publisher.publish(OneTensor(), version)
    engines.refuses = 3
    with pytest.raises(EngineError, match="refused"):
        publisher.publish(OneTensor(), 8)
    for version in range(9, 12):
        publisher.publish(OneTensor(), version)
    assert engines.published == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11]
    assert engines.checked == [1, 4, 7, 11]  # 7 is the seventh published, and 11 the tenth


def test_engines_that_fail_again_and_again_are_given_to_who_can_start_them(ranks: Ranks) -> None:
    engines, given = Engines(), []
    publisher = Publisher(
        engines, engines, ranks.cpu_world, check=lambda: engines, verify_every=1,
        restart=given.append
    )  # fmt: skip
    publisher.publish(OneTensor(), 1)
    engines.refuses, engines.failing = 2, ["http://a:1"]
    publisher.publish(OneTensor(), 2)
    assert given == [["http://a:1"]], "once, between two attempts"
