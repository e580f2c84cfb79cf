"""Says now and then how far a long wait for groups is."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from megatron_efr.types import Group

SAYS_EVERY_S = 10.0


def show_progress(groups: Iterable[Group], name: str, total: int, done: int = 0) -> Iterator[Group]:
    """Pass finished groups on, and print a line every few seconds; `done` of `total` were finished
    before.
    """
    began = said = time.monotonic()
    tokens = 0
    for group in groups:
        done = done + 1
        tokens = tokens + int(group.lengths.sum())
        now = time.monotonic()
        if now - said >= SAYS_EVERY_S:
            said = now
            print(
                f"{name}: {done} of {total} problems, {tokens / (now - began):,.0f} tokens/s",
                flush=True,
            )
        yield group
