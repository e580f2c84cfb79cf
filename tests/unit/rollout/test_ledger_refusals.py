"""Groups that are refused for their content: replaced in order, never asked twice, and never
without end.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_efr.data.stream import PromptStream
from megatron_efr.rollout.ledger import request_seed
from megatron_efr.scripts import plain
from megatron_efr.types import Group, Prompt, Sampling, UserError
from tests.unit.rollout import test_ledger
from tests.unit.rollout.test_ledger import MODES, START, STOP, Loop, MakeLoop, answers, seeds

pytestmark = pytest.mark.alike

make_loop = test_ledger.make_loop


def odd(group: Group) -> bool:
    """About every other group, by nothing but what it says."""
    return bool(group.lengths.sum() % 2)


def all_answers(loop: Loop, count: int) -> list[Group]:
    """Whole groups of the stream's first `count` prompts, in its order."""
    prompts = PromptStream([Prompt(f"p{i}", (START,), "", "") for i in range(7)], seed=0)
    requests = [
        plain(visit.prompt, 4, request_seed(11, visit.index)) for visit in prompts.take(count)
    ]
    loop.engine.publish(iter(loop.weights), 0)
    made = {
        group.seed: group
        for group in loop.engine.generate(iter(requests), Sampling(1.0, 1.0, 600, (STOP,)))
    }
    return [made[request.seed] for request in requests]


def test_the_streams_first_groups_that_are_not_refused_are_taken_whatever_finishes_first(
    make_loop: MakeLoop,
) -> None:
    loop = make_loop(refuses=odd)
    everything = all_answers(loop, 60)
    iterations, refused = [], []
    for _ in range(4):
        iterations.append(loop.iterate())
        refused.append(loop.ledger.refused)
    wanted = [group.seed for group in everything if not odd(group)][:16]
    assert [group.seed for groups in iterations for group in groups] == wanted
    used = [group.seed for group in everything].index(wanted[-1]) + 1
    assert sum(refused) == used - 16 > 5
    assert loop.ledger.state_dict() == {
        **loop.ledger.state_dict(),
        "next_index": used,
        "in_flight": [],
    }


@pytest.mark.parametrize("mode", MODES)
def test_refused_groups_are_replaced_and_no_prompt_is_lost_or_taken_twice(
    mode: str, make_loop: MakeLoop
) -> None:
    loop = make_loop(refuses=odd, **MODES[mode])
    turned_away: set[int] = set()

    def refuses(group: Group) -> bool:
        if odd(group):
            turned_away.add(group.seed)
        return odd(group)

    loop.refuses = refuses
    iterations = [loop.iterate() for _ in range(8)]
    loop.ledger.close()
    assert [len(groups) for groups in iterations] == [4] * 8
    assert not any(odd(group) for groups in iterations for group in groups)
    taken = {group.seed for groups in iterations for group in groups}
    asked = loop.ledger.state_dict()
    waiting = {request_seed(11, index) for index, *_ in asked["in_flight"]}
    # what a thread has just finished may have been turned away, with the run ending before another
    # was drawn
    gone = turned_away - waiting
    assert len(taken) == 32
    assert taken | waiting | gone == set(seeds(asked["next_index"])), "a prompt was lost"
    assert not taken & (waiting | gone)


def test_after_a_kill_refused_groups_are_not_generated_again(make_loop: MakeLoop) -> None:
    whole = make_loop(refuses=odd)
    before = [whole.iterate() for _ in range(2)]
    state = whole.ledger.state_dict()
    lost = whole.iterate()
    assert whole.ledger.refused > 0
    again = make_loop(refuses=odd)
    again.restore(state, 2)
    generated = again.engine.health()["tokens"]
    assert [answers(group) for group in again.iterate()] == [answers(group) for group in lost]
    assert generated == again.engine.health()["tokens"] == 0, "the journal had them all"
    assert len(before) == 2


def test_prompts_that_teach_nothing_at_all_are_an_error_and_not_an_endless_search(
    make_loop: MakeLoop,
) -> None:
    loop = make_loop(refuses=lambda group: True, max_new_tokens=20)
    with pytest.raises(
        UserError, match=r"iteration 1: 81 groups were refused .* rollout\.prompts = 4"
    ):
        loop.iterate()


def test_groups_are_judged_while_others_are_generated(
    make_loop: MakeLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine here does not finish its second group before the first has been judged."""
    loop, judged = make_loop(), threading.Event()
    generate = loop.engine.generate

    def waiting(*arguments: Any) -> Iterator[Group]:
        stream = generate(*arguments)
        yield next(stream)
        assert judged.wait(60), "nothing was judged meanwhile"
        yield from stream

    def refuses(group: Group) -> bool:
        judged.set()
        return False

    monkeypatch.setattr(loop.engine, "generate", waiting)
    loop.refuses = refuses
    assert len(loop.iterate()) == 4


def test_an_error_of_the_graders_reaches_the_iteration(make_loop: MakeLoop) -> None:
    def refuses(group: Group) -> bool:
        raise UserError("the graders have gone")

    for mode in ("in step", "async"):
        with pytest.raises(UserError, match="the graders have gone"):
            make_loop(refuses=refuses, **MODES[mode]).iterate()
