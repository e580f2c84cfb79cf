"""The book of rollouts over the embedded engine: whole groups, none dropped, none lost, as old as
allowed.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from megatron_efr.config import RolloutConfig
from megatron_efr.data.stream import PromptStream
from megatron_efr.errors import NoEngineError
from megatron_efr.rollout.engine import GroupStream
from megatron_efr.rollout.group_feed import GroupFeed
from megatron_efr.rollout.ledger import Ask, Ledger, Visit, request_seed, staleness
from megatron_efr.rollout.local.engine import LocalEngine
from megatron_efr.run.folder import RunFolder
from megatron_efr.scripts import Budget, Forks, Plain, plain
from megatron_efr.types import Group, Prompt, Request, Rewarded, Sampling, UserError
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.mapping import WeightMapping
from tests.groups import credited
from tests.scripts import Letters

pytestmark = pytest.mark.alike

STOP, START, LEVELS = 1, 2, 6
CONFIG = {
    "model_type": "qwen2", "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4, "intermediate_size": 32, "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6, "rope_theta": 1e4,
}  # fmt: skip
Weights = list[tuple[str, torch.Tensor]]


def heavy_tailed_weights() -> Weights:
    """A model whose next token depends on the last alone, and whose lengths have a tail like 1 /
    sqrt(length).

    From the prompt's token it goes to level k with probability proportional to 2^(-k/2). There it
    stops at each token with probability 2^-(k + 1). Embeddings are one-hot, attention and MLP add
    nothing, the head has log-probabilities.
    """
    chain = np.full((32, 32), 1e-30)  # [token, next token]
    levels = range(3, 3 + LEVELS)
    for k, level in enumerate(levels):
        chain[START, level] = 2.0 ** (-k / 2)
        chain[level, [STOP, level]] = 2.0 ** -(k + 1), 1 - 2.0 ** -(k + 1)
    chain[[token for token in range(32) if token not in (START, *levels)], STOP] = 1.0
    logprobs = torch.tensor(np.log(chain / chain.sum(1, keepdims=True)), dtype=torch.float32)
    values = {
        "model.embed_tokens.weight": torch.eye(32),
        "lm_head.weight": logprobs.T / math.sqrt(32.0),  # the norm makes sqrt(32) of a one
    }
    shapes = WeightMapping(Architecture.from_config(CONFIG)).shapes()
    norms = {
        name: torch.ones(shape) for name, shape in shapes.items() if name.endswith("norm.weight")
    }
    return [
        (name, (values | norms).get(name, torch.zeros(shape))) for name, shape in shapes.items()
    ]


class SayLength(Letters):
    """A tokenizer that reads tokens as how many they are."""

    def decode(self, tokens: Sequence[int]) -> str:
        return str(len(tokens))


class Loop:
    """The trainer's calls of the ledger, without training: publish, collect, publish, ..."""

    def __init__(
        self,
        folder: Path,
        last: int = 10**9,
        slots: int = 64,
        gold: str = "",
        refuses: Callable[[Group], bool] = lambda group: False,
        ask: Ask | None = None,
        **rollout: Any,
    ) -> None:
        settings = {"prompts": 4, "samples": 4, "slots": slots, "max_new_tokens": 600} | rollout
        self.config = RolloutConfig.model_validate(settings)
        self.engine, self.weights = (
            LocalEngine(CONFIG, slots, codec=SayLength()),
            heavy_tailed_weights(),
        )
        prompts = PromptStream([Prompt(f"p{i}", (START,), "", gold) for i in range(7)], seed=0)
        sampling = Sampling(1.0, 1.0, self.config.max_new_tokens, (STOP,))
        self.refuses = refuses
        self.feed = GroupFeed(self.engine, sampling)
        self.ledger = Ledger(
            prompts, lambda step: self.accept, self.feed, self.config, seed=11, last=last, ask=ask
        )
        self.folder, self.step, self.last = RunFolder(folder), 0, last

    def accept(self, groups: Sequence[Group]) -> list[Rewarded | None]:
        """Whatever the loop does not refuse, without grades or rewards."""
        made = [credited(group, np.zeros(len(group.responses))).rewarded for group in groups]
        return [None if self.refuses(rewarded.group) else rewarded for rewarded in made]

    def collect(self, step: int) -> list[Group]:
        return [rewarded.group for rewarded in self.ledger.collect(step, self.folder.journal)]

    def restore(self, state: dict[str, Any], step: int) -> None:
        self.ledger.load_state_dict(state)
        self.folder.clear_journals(step)
        self.step = step

    def iterate(self) -> list[Group]:
        """Publish, collect, and train for as long as it takes until the next iteration has a group,
        if it is begun.
        """
        self.engine.publish(iter(self.weights), self.step)
        self.step += 1
        groups = self.collect(self.step)
        limit = time.monotonic() + 60
        while (
            self.config.overlap
            and self.step < self.last
            and not self.folder.journal(self.step + 1).read().groups
        ):
            assert time.monotonic() < limit
            time.sleep(0.005)
        return groups


MakeLoop = Callable[..., Loop]


@pytest.fixture
def make_loop(tmp_path: Path) -> Iterator[MakeLoop]:
    """Loops over one run folder; their threads are ended."""
    made: list[Loop] = []

    def make(**settings: Any) -> Loop:
        made.append(Loop(tmp_path, **settings))
        return made[-1]

    yield make
    for loop in made:
        loop.ledger.close()
    assert not [
        thread.name
        for thread in threading.enumerate()
        if thread.name.startswith(("rollouts", "judging"))
    ]


MODES: dict[str, dict[str, Any]] = {
    "in step": {},
    "partial": {"partial": True},
    "partial, far ahead, old": {"partial": True, "ahead": 4, "max_staleness": 3},
    "async": {"async": True},
    "async, partial": {"async": True, "partial": True, "max_staleness": 2},
}


class Torn(Iterator[Group]):
    """A stream that is lost with its engine after so many groups."""

    def __init__(self, stream: GroupStream, groups: int) -> None:
        self._stream, self._left = stream, groups

    def __iter__(self) -> Torn:
        return self

    def __next__(self) -> Group:
        if not self._left:
            self.close()
            raise NoEngineError("none is left")
        self._left -= 1
        return next(self._stream)

    def close(self) -> None:
        self._stream.close()


def seeds(count: int) -> list[int]:
    return [request_seed(11, visit) for visit in range(count)]


@pytest.mark.parametrize("mode", MODES)
def test_an_iteration_that_lost_its_engine_is_collected_again_and_no_prompt_is_lost_or_taken_twice(
    mode: str, make_loop: MakeLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop(**MODES[mode])
    generate, lasting, lost, iterations = loop.engine.generate, iter([3, 0, 1, 2]), 0, []

    def torn(*arguments: Any) -> GroupStream:
        stream, groups = generate(*arguments), next(lasting, None)
        return stream if groups is None else Torn(stream, groups)

    monkeypatch.setattr(loop.engine, "generate", torn)
    for step in range(1, 9):
        loop.engine.publish(iter(loop.weights), step - 1)
        while len(iterations) < step:
            try:
                iterations.append(loop.collect(step))
            except NoEngineError:
                lost += 1
                loop.engine.publish(iter(loop.weights), step - 1)
    assert lost == (4 if loop.config.partial else 3)  # partial rollouts go on in one stream
    assert [len(groups) for groups in iterations] == [4] * 8
    taken = [group.seed for groups in iterations for group in groups]
    asked = loop.ledger.state_dict()
    waiting = [request_seed(11, index) for index, *_ in asked["in_flight"]]
    assert sorted([*taken, *waiting]) == sorted(seeds(asked["next_index"]))


@pytest.mark.parametrize("mode", MODES)
def test_every_iteration_gets_whole_groups_and_no_prompt_is_lost_or_taken_twice(
    mode: str, make_loop: MakeLoop
) -> None:
    loop = make_loop(**MODES[mode])
    iterations = [loop.iterate() for _ in range(12)]
    loop.ledger.close()
    assert [len(groups) for groups in iterations] == [4] * 12
    taken = [group.seed for groups in iterations for group in groups]
    assert len(set(taken)) == 48
    asked = loop.ledger.state_dict()
    waiting = [request_seed(11, index) for index, *_ in asked["in_flight"]]
    assert sorted([*taken, *waiting]) == sorted(seeds(asked["next_index"])), "a prompt was lost"
    for version, groups in enumerate(iterations):
        assert all(len(group.responses) == 4 for group in groups)
        assert all(0 <= staleness(group, version) <= loop.config.max_staleness for group in groups)
        for response in (response for group in groups for response in group.responses):
            assert response.finish in ("stop", "length")
            assert response.text == str(response.length)
            assert response.versions[0].start == 0
            assert response.versions[-1].end == response.length
            assert all(
                a.end == b.start and a.version < b.version for a, b in pairwise(response.versions)
            )
    oldest = max(
        staleness(group, version) for version, groups in enumerate(iterations) for group in groups
    )
    assert (oldest > 0) == loop.config.off_policy


def answers(group: Group) -> list[tuple[Any, ...]]:
    return [(r.tokens, r.logprobs.tolist(), r.finish, r.versions) for r in group.responses]


def lengths(groups: list[Group]) -> np.ndarray:
    return np.concatenate([group.lengths for group in groups])


def drop_the_slow(
    engine: LocalEngine, requests: Iterator[Request], sampling: Sampling
) -> Iterator[Group]:
    """The wrong way: ask for more prompts than needed, and abort those that are not among the
    first.
    """
    while asked := list(islice(requests, 8)):
        stream: GroupStream = engine.generate(asked, sampling)
        yield from islice(stream, 4)
        stream.close()


def test_lengths_are_the_samplers_if_the_slow_are_resumed_and_not_if_they_are_dropped(
    make_loop: MakeLoop,
) -> None:
    loop = make_loop(partial=True, ahead=4, max_staleness=2, max_new_tokens=400)
    sampling = Sampling(1.0, 1.0, 400, (STOP,))
    prompt = Prompt("p", (START,), "", "")

    def requests(first: int, count: int) -> Iterator[Request]:
        return (plain(prompt, 4, request_seed(5, first + i)) for i in range(count))

    loop.engine.publish(iter(loop.weights), 0)
    sampled = lengths(list(loop.engine.generate(requests(0, 240), sampling)))
    dropped = lengths(list(drop_the_slow(loop.engine, requests(1000, 480), sampling)))
    resumed = lengths([group for _ in range(60) for group in loop.iterate()])
    assert np.quantile(sampled, 0.99) > 20 * np.median(sampled), (
        "the tail is not heavy: an exponential's is 6.6"
    )
    print(
        f"KS: resumed {stats.ks_2samp(resumed, sampled)}, dropped "
        f"{stats.ks_2samp(dropped, sampled)}"
    )
    print(
        f"means: sampled {sampled.mean():.2f}, resumed {resumed.mean():.2f}, dropped "
        f"{dropped.mean():.2f}"
    )
    assert stats.ks_2samp(resumed, sampled).pvalue > 0.01
    assert stats.ks_2samp(dropped, sampled).pvalue < 1e-6
    assert abs(resumed.mean() / sampled.mean() - 1) < 0.25
    assert dropped.mean() / sampled.mean() < 0.6


@pytest.mark.parametrize("mode", MODES)
def test_after_a_kill_prompts_in_flight_come_first_and_finished_groups_are_kept(
    mode: str, make_loop: MakeLoop
) -> None:
    """Checkpoint after iteration 3, killed after 6: the journals give 4 to 6 the groups they
    had.
    """
    loop = make_loop(**MODES[mode])
    before = [loop.iterate() for _ in range(3)]
    state = loop.ledger.state_dict()
    loop.folder.clear_journals(3)
    lost = [loop.iterate() for _ in range(3)]
    loop.ledger.close()

    again = make_loop(**MODES[mode])
    again.restore(state, 3)
    after = [again.iterate() for _ in range(6)]
    again.ledger.close()
    for groups, repeated in zip(lost, after, strict=False):
        assert [g.seed for g in groups] == [g.seed for g in repeated]
        assert [r.tokens for g in groups for r in g.responses] == [
            r.tokens for g in repeated for r in g.responses
        ]
        assert [r.versions for g in groups for r in g.responses] == [
            r.versions for g in repeated for r in g.responses
        ]
    taken = [group.seed for groups in [*before, *after] for group in groups]
    waiting = [request_seed(11, index) for index, *_ in again.ledger.state_dict()["in_flight"]]
    assert sorted([*taken, *waiting]) == sorted(seeds(again.ledger.state_dict()["next_index"]))
    in_flight_then = [request_seed(11, index) for index, *_ in state["in_flight"]]
    assert set(in_flight_then) <= {group.seed for groups in after for group in groups}


class Asking:
    """Asks by what it has seen: a budget that is one token more at every visit, and a fork for one
    sample of four.
    """

    def __init__(self, asked: int = 0) -> None:
        self.asked = asked

    def __call__(self, visit: Visit) -> Request:
        self.asked += 1
        budget = Budget(most=1 + self.asked, end="Z", cut="GG", answer=30)
        scripts = (budget, budget, Plain(), Forks(at=(1, 3), tokens=20, opening="H"))
        return Request(visit.prompt, request_seed(11, visit.index), scripts, {"asked": self.asked})


@pytest.mark.parametrize("mode", ["in step", "partial, far ahead, old"])
def test_after_a_kill_scripts_are_asked_for_as_they_were_and_give_the_same_bits(
    mode: str, make_loop: MakeLoop
) -> None:
    """Killed without a journal: all of iterations 3 and 4 is generated again, from what the
    checkpoint says.
    """
    asking = Asking()
    loop = make_loop(ask=asking, **MODES[mode])
    for _ in range(2):
        loop.iterate()
    state, asked = json.loads(json.dumps(loop.ledger.state_dict())), asking.asked
    assert bool(state["in_flight"]) == loop.config.partial
    lost = {group.seed: group for _ in range(2) for group in loop.iterate()}
    loop.ledger.close()
    loop.folder.clear_journals(10**6)

    again = make_loop(ask=Asking(asked), **MODES[mode])
    again.restore(state, 2)
    after = {group.seed: group for _ in range(2) for group in again.iterate()}
    assert after.keys() == lost.keys()
    for seed, group in lost.items():
        assert (after[seed].scripts, after[seed].note) == (group.scripts, group.note)
        for one, other in zip(group.responses, after[seed].responses, strict=True):
            assert (one.tokens, one.logprobs.tolist()) == (other.tokens, other.logprobs.tolist())
            assert (one.parts, one.finish) == (other.parts, other.finish)
            assert [r.tokens for b in one.branches for r in b.responses] == [
                r.tokens for b in other.branches for r in b.responses
            ]
    parts = [
        part for group in lost.values() for response in group.responses for part in response.parts
    ]
    assert any(part.forced for part in parts)
    assert any(response.branches for group in lost.values() for response in group.responses)


def test_a_checkpoint_of_before_requests_were_kept_is_read(make_loop: MakeLoop) -> None:
    loop = make_loop(partial=True)
    loop.iterate()
    state = loop.ledger.state_dict()
    old = {**state, "in_flight": [[index, since] for index, since, _ in state["in_flight"]]}
    again = make_loop(partial=True)
    again.ledger.load_state_dict(old)
    assert again.ledger.state_dict() == state


def test_a_journal_of_what_was_asked_otherwise_is_refused(make_loop: MakeLoop) -> None:
    make_loop(ask=Asking()).iterate()
    with pytest.raises(UserError, match=r"prompt p\d: .* asked for otherwise, by Budget\(most="):
        make_loop(ask=Asking(7)).iterate()


def test_async_rollouts_are_made_while_nobody_waits_for_them_and_end_with_the_run(
    make_loop: MakeLoop,
) -> None:
    loop = make_loop(last=2, **{"async": True})
    loop.iterate()
    begun = {thread.name for thread in threading.enumerate()}
    assert any(name.startswith("rollouts") for name in begun)
    groups = loop.iterate()  # what was begun with version 0 is taken with version 1
    assert {span.version for group in groups for r in group.responses for span in r.versions} <= {
        0,
        1,
    }
    assert (
        min(span.version for group in groups for r in group.responses for span in r.versions) == 0
    )
    assert loop.ledger.state_dict()["in_flight"] == [], "the last iteration has no next"


def test_another_thread_is_answered_between_two_groups(make_loop: MakeLoop) -> None:
    """An evaluation: what is in flight waits for it, and goes on."""
    loop = make_loop(prompts=8, **{"async": True})
    loop.iterate()
    with loop.feed.held():
        prompt = Prompt("held out", (START,), "", "")
        answered = list(loop.engine.generate([plain(prompt, 3, 1)], Sampling(0.0, 1.0, 5, (STOP,))))
    assert len(answered[0].responses) == 3
    assert len(loop.iterate()) == 8
    loop.ledger.close()


def test_an_error_of_the_thread_reaches_the_iteration_that_waits_for_it(
    make_loop: MakeLoop,
) -> None:
    loop = make_loop(**{"async": True})
    loop.iterate()
    broken = [(name, tensor * float("nan")) for name, tensor in loop.weights]

    def go_on() -> None:
        for step in (2, 3):  # what was begun for the second may have been finished before
            loop.collect(step)

    loop.engine.publish(iter(broken), 1)
    with pytest.raises(RuntimeError, match="not finite"):
        go_on()


def test_a_journal_of_other_prompts_is_not_taken_for_these(make_loop: MakeLoop) -> None:
    """Data changed between a killed first iteration and its resume: no checkpoint knows, the
    journal does.
    """
    groups = make_loop().iterate()
    assert [answers(group) for group in make_loop().iterate()] == [
        answers(group) for group in groups
    ]
    with pytest.raises(
        UserError, match=r"prompt p\d: the journal of this iteration holds 4 responses to another"
    ):
        make_loop(gold="2").iterate()
