"""Rank 0's book of rollouts: prompts in flight, finished groups, and those of an iteration.

An iteration gets `rollout.prompts` whole groups. There are three ways to them, and one book:

- by default it asks as many prompts when it begins, and waits for all.
- partial: `rollout.ahead` more are in flight. It takes the first groups to be complete, and what is
  unfinished goes on in the next iteration, with its weights. A group is taken whole or not at all,
  and none is dropped for being slow: a prompt whose tokens would otherwise be more than
  `rollout.max_staleness` publications behind is waited for.
- async: one step off-policy. From when an iteration's groups are handed over, a thread makes the
  next one's while the policy trains; a publication reaches what is in flight then.

Every group is graded and rewarded as soon as it is finished, while others are still being
generated, and may be refused for its content: the stream's next prompt is then asked in its place.
By default an iteration so gets the stream's first groups that are accepted, in whichever order they
finish. Nothing is refused for being slow.

Finished groups go to the journal of the iteration that may take them, at once, refused ones too.
After a kill, prompts in flight (a checkpoint names them) are taken up first: their groups come from
the journal, in the order in which they were finished, so that iterations whose journal is complete
get the groups they had; the others are generated again. No prompt is lost and none is used twice.
By default, with an engine that draws the same tokens again, the resumed run's numbers are those of
one that was not killed; partial and async depend on when groups finish, and promise only that.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from megatron_efr.config import RolloutConfig
from megatron_efr.rollout.group_feed import GroupFeed
from megatron_efr.rollout.judging import Accept, Judge
from megatron_efr.rollout.request_json import decode_request, encode_request
from megatron_efr.scripts import plain
from megatron_efr.types import Group, Prompt, Request, Rewarded, UserError

REFUSALS = 20
"""Refusals per wanted group before that is an error: far beyond what harder data needs."""


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
    """A journal's content."""

    @property
    def groups(self) -> list[Group]: ...


class Journal(Protocol):
    """Keeps the finished groups that an iteration may take until a checkpoint covers them."""

    def append(self, group: Group) -> None: ...

    def read(self) -> Contents: ...

    def close(self) -> None: ...


Journals = Callable[[int], Journal]
"""The journal of each iteration."""


Ask = Callable[[Visit], Request]
"""Makes the request of a prompt that is drawn; its seed is `request_seed` of the visit."""


class Finished(NamedTuple):
    """The groups that an iteration may take, by seed, in order of completion; how many others were
    refused meanwhile, and the seconds that all took.
    """

    groups: dict[int, Rewarded]
    refused: int
    seconds: float


class InFlight(NamedTuple):
    """A prompt that no iteration has taken yet, and the version of the weights that served when it
    was first asked.
    """

    visit: Visit
    request: Request
    since: int


def request_seed(seed: int, visit: int) -> int:
    """The seed of one request: a function of the run's seed and the visit alone, 63 bits."""
    digest = hashlib.sha256(f"{seed}/{visit}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def staleness(group: Group, version: int) -> int:
    """Publications by which the group's oldest token is behind `version`."""
    return max(version - span.version for response in group.responses for span in response.versions)


class Ledger:
    """Turns prompts into whole groups, iteration by iteration. Asynchronous until iteration `last`.

    `ask` makes the request of a visit; without it `rollout.samples` responses, each drawn at once.
    It is called once: a checkpoint has the requests of what is in flight. `accept_in` gives, as an
    iteration begins, what judges its groups; a thread of its own runs it. The prompt of a group
    that it refuses is used up, and the stream's next prompt is asked instead. UserError if it
    refuses REFUSALS times what an iteration takes.
    """

    def __init__(
        self,
        prompts: Prompts,
        accept_in: Callable[[int], Accept],
        feed: GroupFeed,
        config: RolloutConfig,
        *,
        seed: int,
        last: int,
        ask: Ask | None = None,
    ) -> None:
        self.seconds = 0.0  # that it took to produce the groups handed over last
        self.refused = 0  # while these were produced
        self._prompts = prompts
        self._accept_in = accept_in
        self._feed = feed
        self._config = config
        self._seed, self._last, self._ask = seed, last, ask or self._ask_plainly
        # by the request's seed, in the order in which they were drawn
        self._in_flight: dict[int, InFlight] = {}
        # a checkpoint must not see a prompt that has left the stream and is nowhere
        self._drawing = threading.Lock()
        self._begun: Callable[[], Finished] | None = None
        self._thread = ThreadPoolExecutor(1, "rollouts") if config.overlap else None
        self._judging = ThreadPoolExecutor(1, "judging")

    def collect(self, step: int, journals: Journals) -> list[Rewarded]:
        """Iteration `step`'s groups, in the order of their visits. What they leave is due in the
        next iteration.

        After an error of the engine it can be called again: it asks for what is not in the journal
        yet.
        """
        # what was begun in the background, or what is begun now
        begun = self._begun or self._begin(step, journals)
        self._begun = None
        finished, self.refused, self.seconds = begun()
        # the late ones first, then the first to be complete
        late = [seed for seed in self._in_flight if seed in self._due(step)]
        others = [seed for seed in finished if seed not in late]
        taken = {*late, *others[: self._config.prompts - len(late)]}
        # what else is finished belongs to the next iteration's journal
        self._journal(
            journals(step + 1), [finished[seed].group for seed in finished if seed not in taken]
        )
        # in the order of their visits, whichever finished first
        flights = sorted(
            (self._in_flight[seed] for seed in taken), key=lambda flight: flight.visit.index
        )
        groups = [finished[flight.request.seed] for flight in flights]
        # out of flight; with overlap the next iteration begins at once
        self._in_flight = {
            seed: flight for seed, flight in self._in_flight.items() if seed not in taken
        }
        self._check_staleness([rewarded.group for rewarded in groups], step - 1)
        again = self._thread is not None and step < self._last
        self._begun = self._begin(step + 1, journals) if again else None
        return groups

    def state_dict(self) -> dict[str, Any]:
        """The prompts' own state, and what is in flight: each visit, its version, and the request
        itself, which the prompts alone do not give again if a method asks by what it has seen.
        """
        with self._drawing:
            flights = [
                [flight.visit.index, flight.since, encode_request(flight.request)]
                for flight in self._in_flight.values()
            ]
            return {**self._prompts.state_dict(), "in_flight": flights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was made: prompts in flight are asked first."""
        self._prompts.load_state_dict(state)
        self._in_flight = dict(self._restored(*flight) for flight in state["in_flight"])

    def close(self) -> None:
        """End the threads. What is in flight is dropped, but for the journal and the last
        checkpoint's list of it.
        """
        self._feed.close()
        if self._thread is not None:
            self._thread.shutdown()
        self._judging.shutdown(cancel_futures=True)

    def _begin(self, step: int, journals: Journals) -> Callable[[], Finished]:
        """Draw what iteration `step` needs, and start to produce it; what is returned waits for
        it.
        """
        # first: what is known when it begins decides how prompts are asked, too
        accept = self._accept_in(step)
        self._draw(self._config.prompts + self._config.in_flight_beyond - len(self._in_flight))
        journal = journals(step)
        if self._thread is None:
            return lambda: self._produce(step, journal, accept)
        return self._thread.submit(self._produce, step, journal, accept).result

    def _draw(self, count: int, instead: int | None = None) -> None:
        """Put the stream's next `count` prompts in flight; the request of seed `instead` leaves."""
        version = self._feed.engine.version
        with self._drawing:
            kept = {seed: flight for seed, flight in self._in_flight.items() if seed != instead}
            self._in_flight = kept | dict(
                self._flight(visit, version) for visit in self._prompts.take(count)
            )

    def _flight(self, visit: Visit, since: int) -> tuple[int, InFlight]:
        request = self._ask(visit)
        return request.seed, InFlight(visit, request, since)

    def _ask_plainly(self, visit: Visit) -> Request:
        return plain(visit.prompt, self._config.samples, request_seed(self._seed, visit.index))

    def _restored(
        self, index: int, since: int, asked: Mapping[str, Any] | None = None
    ) -> tuple[int, InFlight]:
        """A prompt in flight, of `state_dict`. Older states have no request: it is asked anew."""
        visit = self._prompts.visit(index)
        if asked is None:
            return self._flight(visit, since)
        request = decode_request(asked)
        return request.seed, InFlight(visit, request, since)

    def _produce(self, step: int, journal: Journal, accept: Accept) -> Finished:
        """Ask until what is finished and accepted is enough for iteration `step`."""
        began = time.perf_counter()
        # after a kill the journal has some of them already
        held = {group.seed: group for group in journal.read().groups}
        judge = Judge(accept, self._judging)
        accepted = dict[int, Rewarded]()
        refused = 0
        try:
            # judge what is finished, ask for what is missing, replace what is refused
            while not self._suffice(step, accepted.keys()):
                # nothing is left to generate while those that are being judged may be enough
                judged = judge.next(wait=self._suffice(step, accepted.keys() | judge.waiting))
                if judged is None:
                    self._finish_another(judge, accepted.keys() | judge.waiting, held, journal)
                elif judged.rewarded is not None:
                    accepted[judged.seed] = judged.rewarded
                else:
                    refused += 1
                    self._check_refused(refused, step)
                    self._draw(1, instead=judged.seed)
        finally:
            journal.close()
        return Finished(accepted, refused, time.perf_counter() - began)

    def _finish_another(
        self, judge: Judge, finished: Set[int], held: dict[int, Group], journal: Journal
    ) -> None:
        """Hand what is not `finished` to the judge: all that the journal held, else the engine's
        next group.
        """
        # journalled groups first: they are free
        missing = {
            seed: flight.request for seed, flight in self._in_flight.items() if seed not in finished
        }
        journalled = [held.pop(seed) for seed in list(held) if seed in missing]
        for group in journalled:
            _check_same(group, missing[group.seed])
            judge.add(group)
        # then the engine's next one
        if not journalled:
            self._feed.ask(missing.values())
            group = self._feed.next()
            if group.seed in missing:  # a journal may have had it meanwhile
                journal.append(group)
                judge.add(group)

    def _suffice(self, step: int, seeds: Set[int]) -> bool:
        """True if the groups of these seeds are enough for iteration `step`."""
        return len(seeds) >= self._config.prompts and self._due(step) <= seeds

    def _due(self, step: int) -> set[int]:
        """Seeds whose first tokens would be too old in the iteration after `step`: `step`
        publications precede it.
        """
        return {
            seed
            for seed, flight in self._in_flight.items()
            if step - flight.since > self._config.max_staleness
        }

    def _journal(self, journal: Journal, groups: Iterable[Group]) -> None:
        """Hand finished groups on to a journal that may, after a resume, hold them already."""
        held = {group.seed for group in journal.read().groups}
        for group in groups:
            if group.seed not in held:
                journal.append(group)
        journal.close()

    def _check_refused(self, refused: int, step: int) -> None:
        if refused > REFUSALS * self._config.prompts:
            raise UserError(
                f"iteration {step}: {refused} groups were refused for their content, and "
                f"rollout.prompts = {self._config.prompts} are needed: the prompts teach nothing, "
                "since the model gets all responses to them right, or all wrong. Give it harder "
                "or easier prompts, or an algorithm that takes every group"
            )

    def _check_staleness(self, groups: list[Group], version: int) -> None:
        for group in groups:
            if staleness(group, version) > self._config.max_staleness:
                raise RuntimeError(
                    f"prompt {group.prompt.id}: its tokens are {staleness(group, version)} "
                    f"publications behind the policy's version {version}, and "
                    f"rollout.max_staleness = {self._config.max_staleness} should have held the "
                    "iteration before this one for it"
                )


def _check_same(held: Group, request: Request) -> None:
    """Refuse a journalled group that answers another prompt than the stream now gives at its
    place.
    """
    now, then = request.prompt, held.prompt
    if (then.tokens, then.gold, len(held.responses)) != (now.tokens, now.gold, request.samples):
        raise UserError(
            f"prompt {now.id}: the journal of this iteration holds {len(held.responses)} "
            f"responses to another prompt ({then.id}) at its place; put the data and the "
            "tokenizer back as they were, or start a new run"
        )
    if held.scripts and held.scripts != request.scripts:
        raise UserError(
            f"prompt {now.id}: the journal of this iteration holds responses that were asked for "
            f"otherwise, by {held.scripts[0]!r}; put the method's options back as they were, or "
            "start a new run"
        )
