"""Rank 0's book of rollouts: which prompts are due, which groups are finished, which must be generated (again)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from megatron_efr.rollout.engine import Engine
from megatron_efr.types import Group, Prompt, Request, Sampling, UserError


class Visit(Protocol):
    """One drawing of a prompt; `index` counts all drawings of the run."""

    @property
    def index(self) -> int: ...

    @property
    def prompt(self) -> Prompt: ...


class Contents(Protocol):
    """What a journal holds."""

    @property
    def groups(self) -> list[Group]: ...


class Journal(Protocol):
    """Where finished groups of one iteration are kept until a checkpoint covers them."""

    def append(self, group: Group) -> None: ...

    def read(self) -> Contents: ...

    def close(self) -> None: ...


def request_seed(seed: int, visit: int) -> int:
    """The seed of one request: a function of the run's seed and the visit alone, 63 bits."""
    digest = hashlib.sha256(f"{seed}/{visit}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _check_same(held: Group, request: Request) -> None:
    """Refuse a journalled group that answers another prompt than the stream now gives at its place."""
    then, now = held.prompt, request.prompt
    if (then.tokens, then.gold, len(held.responses)) != (now.tokens, now.gold, request.samples):
        raise UserError(
            f"prompt {now.id}: the journal of this iteration holds {len(held.responses)} responses to another prompt "
            f"({then.id}) at its place; put the data and the tokenizer back as they were, or start a new run"
        )


class Ledger:
    """Turns prompts into whole groups and loses none: what is finished is journalled at once."""

    def __init__(
        self, engine: Engine, sampling: Sampling, samples: int, seed: int, decode: Callable[[list[int]], str]
    ) -> None:
        self.engine, self.sampling, self.samples, self.seed = engine, sampling, samples, seed
        self._decode = decode

    def collect(self, visits: Sequence[Visit], journal: Journal) -> list[Group]:
        """Every visit's group, in order; what the journal already holds is taken from it and not generated again."""
        requests = [Request(v.prompt, self.samples, request_seed(self.seed, v.index)) for v in visits]
        finished = {group.seed: group for group in journal.read().groups}
        for request in requests:
            if request.seed in finished:
                _check_same(finished[request.seed], request)
        missing = [request for request in requests if request.seed not in finished]
        try:
            for group in self._generate(missing):
                journal.append(group)
                finished[group.seed] = group
        finally:
            journal.close()
        return [finished[request.seed] for request in requests]

    def _generate(self, requests: list[Request]) -> Iterator[Group]:
        if not requests:
            return
        for group in self.engine.generate(requests, self.sampling):
            for response in group.responses:
                response.text = self._decode(response.tokens)
            yield group
