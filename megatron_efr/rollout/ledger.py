"""Rank 0's book of rollouts: which prompts are in flight, which groups are finished, and what an iteration gets.

An iteration gets `rollout.prompts` whole groups. There are three ways to them, and one book:

- by default it asks as many prompts when it begins, and waits for all.
- partial: `rollout.ahead` more are in flight. It takes the first groups to be complete, and what is unfinished goes on
  in the next iteration, with its weights. A group is taken whole or not at all, and none is dropped for being slow: a
  prompt whose tokens would otherwise be more than `rollout.max_staleness` publications behind is waited for.
- async: one step off-policy. From when an iteration's groups are handed over, a thread makes the next one's while the
  policy trains; a publication reaches what is in flight then.

Finished groups go to the journal of the iteration that may take them, at once. After a kill, prompts in flight (a
checkpoint names them) are taken up first: their groups come from the journal, in the order in which they were
finished, so that iterations whose journal is complete get the groups they had; the others are generated again. No
prompt is lost and none is used twice. By default, with an engine that draws the same tokens again, the resumed run's
numbers are those of one that was not killed; partial and async depend on when groups finish, and promise only that.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from megatron_efr.config import RolloutConfig
from megatron_efr.rollout.production import Production
from megatron_efr.types import Group, Prompt, Request, UserError


class Visit(Protocol):
    """One drawing of a prompt; `index` counts all drawings of the run."""

    @property
    def index(self) -> int: ...

    @property
    def prompt(self) -> Prompt: ...


class Prompts(Protocol):
    """The endless stream of prompts; its state is a dictionary of plain values."""

    def take(self, count: int) -> Sequence[Visit]: ...

    def visit(self, index: int) -> Visit: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Contents(Protocol):
    """What a journal holds."""

    @property
    def groups(self) -> list[Group]: ...


class Journal(Protocol):
    """Where finished groups that an iteration may take are kept until a checkpoint covers them."""

    def append(self, group: Group) -> None: ...

    def read(self) -> Contents: ...

    def close(self) -> None: ...


Journals = Callable[[int], Journal]
"""The journal of each iteration."""


class Finished(NamedTuple):
    """The groups that an iteration may take, by visit, in order of completion, and the seconds that they took."""

    groups: dict[int, Group]
    seconds: float


class InFlight(NamedTuple):
    """A prompt that no iteration has taken yet, and the version of the weights that served when it was first asked."""

    visit: Visit
    since: int


def request_seed(seed: int, visit: int) -> int:
    """The seed of one request: a function of the run's seed and the visit alone, 63 bits."""
    digest = hashlib.sha256(f"{seed}/{visit}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def staleness(group: Group, version: int) -> int:
    """By how many publications the group's oldest token is behind `version`."""
    return max(version - span.version for response in group.responses for span in response.versions)


class Ledger:
    """Turns prompts into whole groups, iteration by iteration. Asynchronous until iteration `last`."""

    def __init__(self, production: Production, config: RolloutConfig, prompts: Prompts, seed: int, last: int) -> None:
        self.seconds = 0.0  # that it took to produce the groups handed over last
        self._production, self._config, self._prompts, self._seed, self._last = production, config, prompts, seed, last
        self._in_flight: list[InFlight] = []
        self._begun: Callable[[], Finished] | None = None
        self._thread = ThreadPoolExecutor(1, "rollouts") if config.overlap else None

    def collect(self, step: int, journals: Journals) -> list[Group]:
        """Iteration `step`'s groups, in the order of their visits. What they leave is due in the next iteration.

        After an error of the engine it can be called again: it asks for what is not in the journal yet.
        """
        begun, self._begun = self._begun or self._begin(step, journals), None
        finished, self.seconds = begun()
        late = [flight.visit.index for flight in self._in_flight if self._is_due(flight, step)]
        others = [index for index in finished if index not in late]
        taken = sorted(late + others[: self._config.prompts - len(late)])
        self._journal(journals(step + 1), [finished[index] for index in finished if index not in taken])
        self._in_flight = [flight for flight in self._in_flight if flight.visit.index not in taken]
        groups = [finished[index] for index in taken]
        self._check_staleness(groups, step - 1)
        again = self._thread is not None and step < self._last
        self._begun = self._begin(step + 1, journals) if again else None
        return groups

    def state_dict(self) -> dict[str, Any]:
        """The prompts' own state, and which of those they gave are in flight."""
        flights = [[flight.visit.index, flight.since] for flight in self._in_flight]
        return {**self._prompts.state_dict(), "in_flight": flights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was made: prompts in flight are asked first."""
        self._prompts.load_state_dict(state)
        self._in_flight = [InFlight(self._prompts.visit(index), since) for index, since in state["in_flight"]]

    def close(self) -> None:
        """End the thread. What is in flight is dropped, but for the journal and the last checkpoint's list of it."""
        self._production.close()
        if self._thread is not None:
            self._thread.shutdown()

    def _begin(self, step: int, journals: Journals) -> Callable[[], Finished]:
        """Draw what iteration `step` needs, and start to produce it; what is returned waits for it."""
        missing = self._config.prompts + self._config.in_flight_beyond - len(self._in_flight)
        version = self._production.engine.version
        self._in_flight += [InFlight(visit, version) for visit in self._prompts.take(missing)]
        flights, journal = list(self._in_flight), journals(step)
        if self._thread is None:
            return lambda: self._produce(step, flights, journal)
        return self._thread.submit(self._produce, step, flights, journal).result

    def _produce(self, step: int, flights: list[InFlight], journal: Journal) -> Finished:
        """Ask until what is finished is enough for iteration `step`."""
        began = time.perf_counter()
        requests = [self._request(flight.visit) for flight in flights]
        index = {request.seed: flight.visit.index for request, flight in zip(requests, flights, strict=True)}
        held = {group.seed: group for group in journal.read().groups}
        _check_same(held, requests)
        finished = {index[seed]: group for seed, group in held.items() if seed in index}
        late = {flight.visit.index for flight in flights if self._is_due(flight, step)}
        try:
            while len(finished) < self._config.prompts or not late <= finished.keys():
                self._production.ask(request for request in requests if index[request.seed] not in finished)
                group = self._production.next()
                if index.get(group.seed, -1) not in {-1, *finished}:  # a journal may have had it meanwhile
                    journal.append(group)
                    finished[index[group.seed]] = group
        finally:
            journal.close()
        return Finished(finished, time.perf_counter() - began)

    def _request(self, visit: Visit) -> Request:
        return Request(visit.prompt, self._config.samples, request_seed(self._seed, visit.index))

    def _is_due(self, flight: InFlight, step: int) -> bool:
        """Whether in the iteration after `step`, which `step` publications precede, its first tokens were too old."""
        return step - flight.since > self._config.max_staleness

    def _journal(self, journal: Journal, groups: Iterable[Group]) -> None:
        """Hand finished groups on to a journal that may, after a resume, hold them already."""
        held = {group.seed for group in journal.read().groups}
        for group in groups:
            if group.seed not in held:
                journal.append(group)
        journal.close()

    def _check_staleness(self, groups: list[Group], version: int) -> None:
        for group in groups:
            if staleness(group, version) > self._config.max_staleness:
                raise RuntimeError(
                    f"prompt {group.prompt.id}: its tokens are {staleness(group, version)} publications behind the "
                    f"policy's version {version}, and rollout.max_staleness = {self._config.max_staleness} should have "
                    "held the iteration before this one for it"
                )


def _check_same(held: Mapping[int, Group], requests: Iterable[Request]) -> None:
    """Refuse a journalled group that answers another prompt than the stream now gives at its place."""
    for request in requests:
        if request.seed in held:
            group, now = held[request.seed], request.prompt
            then = group.prompt
            if (then.tokens, then.gold, len(group.responses)) != (now.tokens, now.gold, request.samples):
                raise UserError(
                    f"prompt {now.id}: the journal of this iteration holds {len(group.responses)} responses to another "
                    f"prompt ({then.id}) at its place; put the data and the tokenizer back as they were, or start a "
                    "new run"
                )
