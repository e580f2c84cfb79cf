"""Methods with a memory against worked numbers: histories, controllers, prices; a kill changes
nothing.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_efr import methods
from megatron_efr.methods import METHODS, Method, Sampled, Seen
from megatron_efr.methods.relative import GFPO
from tests.groups import KNOWN
from tests.judged import C, L, build, close, outputs, rewarded, trained_on
from tests.unit.methods.test_told import visit

pytestmark = pytest.mark.alike


def test_worked_rewards_against_a_prompts_history() -> None:
    seen = Seen(visits=3, responses=12, right=5, right_tokens=2000, shortest_right=250, last_step=7)
    known = KNOWN._replace(history={"p": seen})
    assert trained_on(build("hapo"), C, L, known) == close(outputs("hapo")["rewards"])
    assert trained_on(build("hapo"), C, L) == close(outputs("hapo")["rewards_h_unset"])
    mean = trained_on(build("hapo", history="mean"), C, L, known)  # of 400 tokens
    assert mean == close(
        [1 + np.cos(np.pi * 3 / 8), -1, 1 + np.cos(np.pi * 5 / 8), 1 + np.cos(np.pi * 0.15)]
    )
    unsolved = KNOWN._replace(
        history={"p": seen._replace(right=0, right_tokens=0, shortest_right=None)}
    )
    assert trained_on(build("hapo"), C, L, unsolved) == close(C)
    knowledge = methods.Knowledge(build("hapo"), 1000)
    knowledge.begin(1)
    knowledge.learn(1, rewarded(build("hapo"), [(C, L)]))
    assert knowledge.begin(2).history["p"].shortest_right == outputs("hapo")["h_after"]


def test_right_answers_are_shortened_while_the_iteration_is_accurate() -> None:
    method, vector = build("short_rl"), outputs("short_rl")
    assert rewarded(method, [(C, L)])[0].rewards == close(vector["rewards_gate_open"])
    assert rewarded(method, [(C, L)], KNOWN._replace(state={"best": 0.79}))[0].rewards == close(
        vector["rewards_gate_open"]
    )
    # 0.35 is exactly the slack below 0.4, since 0.4 - 0.05 is 0.35000000000000003
    (least,) = rewarded(
        method, [([1] * 7 + [0] * 13, list(range(1, 21)))], KNOWN._replace(state={"best": 0.4})
    )
    assert least.rewards[0] == 3.5
    closed = KNOWN._replace(state={"best": 0.81})
    assert rewarded(method, [(C, L)], closed)[0].rewards == close(vector["rewards_gate_closed"])
    assert method.learn({}, rewarded(method, [(C, L)]), KNOWN) == {"best": 0.75}
    assert method.learn({"best": 0.81}, rewarded(method, [(C, L)]), KNOWN) == {"best": 0.81}
    cut = rewarded(method, [(C, L)], finish=["stop", "length", "stop", "stop"])[0].rewards
    assert cut[1] == -3.0  # no answer, and no form


def test_a_price_follows_the_batch() -> None:
    leash = build("leash", target=400)
    known = KNOWN._replace(state={"lambda": 0.2})
    assert trained_on(leash, C, L, known) == close(outputs("leash")["rewards"])
    after = leash.learn(known.state, rewarded(leash, [(C, L)]), known)
    assert after["lambda"] == pytest.approx(float(outputs("leash")["lambda_next"]), abs=1e-12)
    assert leash.learn({"lambda": 0.9999}, rewarded(leash, [(C, L)]), known) == {"lambda": 1.0}
    longest = build("leash", target=400, over="max").learn(
        known.state, rewarded(leash, [(C, L)]), known
    )
    assert longest["lambda"] == pytest.approx(0.2 + 0.005 * 1.25)
    a_dlp = build("a_dlp")
    assert trained_on(a_dlp, C, L) == close(outputs("a_dlp")["rewards"])
    after = a_dlp.learn({}, rewarded(a_dlp, [(C, L)]), KNOWN)
    assert after["lambda"] == pytest.approx(float(outputs("a_dlp")["lambda_next"]), abs=1e-12)
    assert a_dlp.learn({"lambda": 1e-4}, rewarded(a_dlp, [([0] * 4, L)]), KNOWN) == {"lambda": 0.0}


def test_a_bonus_and_its_budget_follow_accuracy_and_length() -> None:
    """The worked numbers count characters, four to a token."""
    method, vector = build("acoer", lookback=1, least_budget=512), outputs("acoer")
    state = {"alpha": 0.1, "budget": 400, "accuracy": 0.6, "length": 1500 / 4, "accuracies": [0.55]}
    known = KNOWN._replace(step=201, state=state)
    assert trained_on(method, C, L, known) == close(vector["rewards"])
    groups = rewarded(method, [(C, L)], known)
    after = method.learn(state, groups, known)
    assert after["accuracy"] == close(vector["ema_acc_next"])
    assert after["length"] * 4 == pytest.approx(vector["ema_len_next"], abs=1e-3)
    assert after["alpha"] == close(vector["alpha_next"])
    assert after["budget"] * 4 == vector["B_next"]
    assert state["alpha"] == 0.1, "what was remembered stays as it was"
    assert method.learn(state | {"accuracies": [0.65]}, groups, known)["alpha"] == pytest.approx(
        0.095
    )
    assert method.learn(state, groups, known._replace(step=200))["alpha"] == 0.1
    none_right = method.learn({}, rewarded(method, [([0] * 4, L)]), KNOWN)
    assert (none_right["length"], none_right["accuracy"]) == (None, 0.0)


def test_easier_prompts_keep_fewer_responses() -> None:
    method = build("gfpo", keep=8, adaptive=True, samples=16)
    state = {"iterations": 10, "solved": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]}
    lengths = list(range(10, 26))
    for right, kept in ((1, 8), (4, 8), (9, 6), (13, 4)):
        correct = (
            [i % 2 == 1 for i in range(16)]
            if right == 8
            else [True] * right + [False] * (16 - right)
        )
        correct[0], correct[15] = False, True  # the shortest is wrong
        made = trained_on(method, correct, lengths, KNOWN._replace(state=state))
        unlike_shortest = [i for i in range(kept) if correct[i] != correct[0]]
        assert np.count_nonzero(made) == (kept if unlike_shortest else 0), right
    assert isinstance(method, GFPO)
    early = trained_on(
        method, [False] + [True] * 15, lengths, KNOWN._replace(state=state | {"iterations": 9})
    )
    assert np.count_nonzero(early) == 8
    after = method.learn(state, rewarded(method, [([1] * 12 + [0] * 4, lengths)]), KNOWN)
    assert (after["iterations"], after["solved"][-1]) == (11, 0.75)


def learn_from(
    method: Method, knowledge: methods.Knowledge, first: int, last: int
) -> list[np.ndarray]:
    """Credits of iterations `first` to `last`, of ever the same groups."""
    made = []
    for step in range(first, last + 1):
        if method.samplings.monitor:
            knowledge.monitor(step - 1, {"p": Sampled((700, 900), (step > 2, True))})
        known = knowledge.begin(step)
        rng = np.random.default_rng(step)
        groups = [(rng.random(4) < 0.5, rng.integers(1, 3000, 4).tolist()) for _ in range(3)]
        settled = rewarded(method, groups, known, note=method.ask(visit(step), known).note)
        credits = method.credits(settled, known)
        made += (
            [group.rewards for group in settled]
            if credits is None
            else [each.advantage for each in credits]
        )
        knowledge.learn(step, settled)
    return made


@pytest.mark.parametrize("name", sorted(METHODS))
def test_memory_survives_a_kill_bit_for_bit(name: str) -> None:
    options = {
        "acoer": {"warmup": 2, "lookback": 2},
        "gfpo": {"keep": 3, "adaptive": True, "warmup": 2},
        "leash": {"target": 500, "rate": 0.1},
        "lapo": {"second_from": 3},
        "experimental.memory_r": {"explore_from": 2},
        "anytime": {"budgets": [500, 1000]},
    }.get(name, {})
    method = build(name, tokens=5000, **options)
    whole, cut, resumed, none = (methods.Knowledge(method, 5000, KNOWN.marks) for _ in range(4))
    for each in (whole, cut, resumed, none):
        each.reference = KNOWN.reference  # the run folder keeps it
    expected = learn_from(method, whole, 1, 8)
    first = learn_from(method, cut, 1, 4)
    resumed.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    again = first + learn_from(method, resumed, 5, 8)
    assert all(np.array_equal(one, other) for one, other in zip(again, expected, strict=True))
    assert json.dumps(resumed.state_dict()) == json.dumps(whole.state_dict())
    forgot = first + learn_from(method, none, 5, 8)
    same = all(np.array_equal(one, other) for one, other in zip(forgot, expected, strict=True))
    remembers = type(method).learn is not Method.learn or name == "hapo"
    assert same != remembers, "memory must matter, or the test says nothing"
