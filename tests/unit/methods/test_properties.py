"""Properties of every method: bounds, signs, what is said of it, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_efr import methods
from megatron_efr.methods import METHODS, Known, Sampled, Seen
from megatron_efr.types import Finish
from tests.groups import KNOWN
from tests.judged import C, L, asked, build, drawn_groups, rewarded, trained_on

pytestmark = pytest.mark.alike


# -- properties
# --------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[list[int], list[int]]] = {
    "mixed": (C, L),
    "all right": ([1, 1, 1, 1], L),
    "all wrong": ([0, 0, 0, 0], L),
    "one right": ([0, 1, 0, 0], L),
    "equal lengths": (C, [300, 300, 300, 300]),
}
BOUNDS = {
    "efr": (0.8, 1, 0, 0), "shorterbetter": (-38, 2, -40, 0), "kimi": (0.5, 1.5, -0.5, 0),
    "lapo": (1, 1.7, 0, 0),
    "prime_rl": (0.55, 1, -0.45, 0), "overlong": (0, 1, -2, -1), "thinkprune": (0, 1, 0, 0),
    "cosine": (-10, 2, -10, 0),
    "laser": (1, 1.5, -0.5, -0.5), "dler": (0, 1, 0, 0), "da_dler": (0, 1, 0, 0),
    "stop_properly": (1, 1, 0, 0),
    "experimental.alp": (0.996, 1, -0.004, 0), "experimental.gr3": (0, 1, 0, 0),
    "grpo_lambda": (0.8, 1, 0, 0),
    "hapo": (0.3, 2, -1, 0), "short_rl": (2.5, 3.5, -0.5, -0.5), "leash": (-1, 1, -1, -1),
    "a_dlp": (-39, 1, -40, 0),
    "acoer": (1, 1.02, 0, 0), "twyn": (-0.1, 4, -4, 0), "gfpo": (0, 4, -4, 0),
    "gdpo": (-4, 4, -4, 4),
    "qglas": (0, 2, -1, 0), "l1_exact": (-11, 1, -12, 0), "l1_max": (-11, 1, -12, 0),
    "asrr": (0.5, 1, 0, 0),
    "elastic": (1, 1, 0, 0), "autothink": (0, 2, -2, 0), "adactrl": (0.5, 2, -0.5, 0.5),
    "grlc": (0, 3, -1, 2), "experimental.effort": (0.6, 1, 0, 0),
    "experimental.target": (1, 1, 0, 0),
    "laser_d": (1, 1.5, -0.5, -0.5),
    "laser_de": (1, 1.5, -0.5, 0),
    "anytime": (-1, 1, -1, 1), "mrt": (0, 1, -1, 0), "s_grpo": (-0.35, 1, -0.5, 0),
    "jet": (-3, 7, -7, 0),
    "drpo": (0, 12, -12, 0), "o1_pruner": (-1, 1, -1, 1),
    "adapt_think": (-0.5, 0.55, -0.5, -0.45), "thinkless": (-0.5, 2, -2, 0),
    "experimental.o1_pruner_online": (-2, 4, -2, 4), "experimental.self_budgeter": (-1, 1, -1, 0),
    "experimental.adacot": (0.7, 1, -0.3, 0), "experimental.memory_r": (1, 3, 0, 2),
    "infty_think": (0, 1, -1, 0), "experimental.sgpo": (1, 1, 0, 1),
    "experimental.l2t": (0, 1, -1, 0),
}  # fmt: skip
"""Least and most that a right answer may earn, and a wrong one: rewards, or advantages if the
method gives them.
"""
PRICED = {
    "laser_de",
    "o1_pruner",
    "experimental.o1_pruner_online",
    "adapt_think",
    "shorterbetter",
    "kimi",
    "overlong",
    "cosine",
    "gdpo",
    "experimental.alp",
    "a_dlp",
    "l1_exact",
    "l1_max",
}
"""Methods that tell wrong answers apart by their lengths, whatever else is in the group."""
BRANCHING = {"anytime", "mrt", "s_grpo", "experimental.sgpo"}
"""Methods to which what a thought would have answered before tells responses apart, whatever their
own answer.
"""
NOT_MONOTONE = {
    "lapo": "a middle length earns most",
    "adapt_think": "one that does not think earns more, however long",
    "experimental.memory_r": "what is nearer to earlier answers earns more",
    "l1_exact": "the budget earns most",
    "l1_max": "an exact budget earns most",
    **dict.fromkeys(BRANCHING, "what it would have answered before decides"),
}
SAID = ["...\nFirst, 2", "...\n</think>\n4", "[Easy] 4", "[Hard] 4"]
"""Texts of responses by which modes are told."""
TEXTS = {
    "adapt_think": ["</think>4", "</think>4", "Alright</think>4", "Alright 4"],
    "thinkless": ["<short>4", "<think>2</think>4"],
    "experimental.adacot": ["</think>4", "So 2</think>4"],
    "experimental.self_budgeter": ["<budget>300</budget>4", "4", "<budget>9</budget>4"],
}
"""The same, of methods that look for others."""


def knowns(name: str) -> list[Known]:
    """Knowledge that a method may meet: none, and a history of which it makes use."""
    if name == "experimental.memory_r":
        before = build(name).learn({}, rewarded(build(name), [(C, L), ([0, 0], [7, 80])]), KNOWN)
        near = KNOWN._replace(
            step=60, state={**before, "near": [-110.0, 0.0], "unlike": [0.0, 0.001]}
        )
        return [KNOWN, near]
    if name in ("laser_d", "laser_de"):
        monitored = {
            "hard": Sampled((700, 900, 2000, 9000), (True, False, False, False)),
            "easy": Sampled((90,), (True,)),
        }
        return [KNOWN, KNOWN._replace(monitor=monitored)]
    seen = Seen(visits=1, responses=4, right=2, right_tokens=1200, shortest_right=250, last_step=1)
    return [KNOWN, KNOWN._replace(history={"p": seen})] if name == "hapo" else [KNOWN]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_bounds_and_signs(name: str) -> None:
    method, (low, high, wrong_low, wrong_high) = build(name), BOUNDS[name]
    for right, lengths in [*KINDS.values(), *drawn_groups(1, 80)]:
        for known in knowns(name):
            said = TEXTS.get(name, SAID)
            got, hit = (
                trained_on(method, right, lengths, known, texts=said),
                np.array(right, dtype=bool),
            )
            if name == "o1_pruner":  # the others are not trained on
                got, hit = got[: method.trained], hit[: method.trained]
            assert got.dtype == np.float64
            assert np.all(np.isfinite(got))
            assert np.all((got[hit] >= low - 1e-9) & (got[hit] <= high + 1e-9)), (
                right,
                lengths,
                got,
            )
            assert np.all((got[~hit] >= wrong_low - 1e-9) & (got[~hit] <= wrong_high + 1e-9)), (
                right,
                lengths,
                got,
            )


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(NOT_MONOTONE)))
def test_a_longer_right_answer_never_earns_more(name: str) -> None:
    method = build(name)
    for right, lengths in [*KINDS.values(), *drawn_groups(2, 80)]:
        for known in knowns(name):
            got, hit = trained_on(method, right, lengths, known), np.array(right, dtype=bool)
            earned = got[hit][np.argsort(np.array(lengths)[hit], kind="stable")]
            if name == "gfpo":  # what is not kept gets 0, and what is kept gets more or nothing
                earned = earned[earned > 0]
            assert np.all(np.diff(earned) <= 1e-9), (right, lengths, got)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_wrong_answer_earns_more_than_a_right_one_only_where_that_is_said(name: str) -> None:
    method = build(name, beta=1e-4) if name == "experimental.alp" else build(name)
    found = []
    few = ([1] + [0] * 11, [5] * 12, [f"{'t' * 90}</think>{'a' * 90}", *["t</think>a"] * 11])
    drawn = [
        (right, lengths, TEXTS.get(name, SAID))
        for right, lengths in [*KINDS.values(), *drawn_groups(3, 100)]
    ]
    for right, lengths, texts in [few, *drawn]:
        for known in knowns(name):
            got, hit = (
                trained_on(method, right, lengths, known, texts=texts),
                np.array(right, dtype=bool),
            )
            if hit.any() and not hit.all() and got[~hit].max() > got[hit].min() + 1e-9:
                found.append((right, lengths, got))
    assert bool(found) == bool(method.wrong_may_win), (method.wrong_may_win, found[:1])


CHOSEN: dict[str, list[dict[str, Any]]] = {
    "hapo": [{"weight": 2.0}], "adactrl": [{"tag": 1.0}],
    "overlong": [{"floor": False, "max_tokens": 100}],
    "short_rl": [{"right": -2.0}, {"wrong": 1.9}], "autothink": [{"stage": 3, "decay": 3.0}],
    "grlc": [{"thinking": 3.0, "answer": 3.0, "thinking_bonus": 0.0, "answer_bonus": 0.0}],
    "cosine": [{"wrong_long": 3.0, "exceeded": None}], "gdpo": [{"short": 3.0}],
    "efr": [{"alpha": 0.99}], "kimi": [{}],
    "prime_rl": [{"length": 1.0, "prompt": 1.0, "turns": 1.0}],
    "laser": [{"wrong": 0.99, "unanswered": 0.99}],
    "laser_d": [{"wrong": 0.99, "unanswered": 0.99, "bonus": 9.0}],
    "infty_think": [{}], "experimental.sgpo": [{"slope": 99.0}],
    "experimental.l2t": [{"alpha": 9.0}],
    "drpo": [{"spread": 0.001}, {"tau": 0.001}], "adapt_think": [{"delta": 2.0}],
    "thinkless": [{"thinking": -3.0}],
    "experimental.adacot": [{"missed": 1.5}, {"needless": 1.5}],
    "laser_de": [{"wrong": 0.6, "lowest": 60}, {"unanswered": 0.6, "lowest": 60}],
    "dler": [{"limit": 50}], "da_dler": [{"easy": 5, "hard": 50}],
    "thinkprune": [{"limit": 50}], "stop_properly": [{"cut_off": -9.0}],
    "grpo_lambda": [{"share": 1.0, "alpha": 0.99}],
    "twyn": [{"margin": 1.0}], "gfpo": [{"keep": 1}, {"keep": 3, "by": "reward_per_token"}],
    "qglas": [{"low": 5.0, "high": 9.0}, {"low": 0.0, "high": 0.0}],
    "leash": [{"target": 1, "start": 1.0}],
    "acoer": [{"start": 9.0, "budget": 512}], "asrr": [{"beta": 1.0, "tau": 0.0, "window": 1.0}],
    "elastic": [{}], "lapo": [{"weight": 9.0}], "experimental.gr3": [{"alpha": 99.0}],
    "experimental.effort": [{"low": 0.99}], "mrt": [{"answers": 3}],
    "jet": [{"form": 1.0, "least": 0.0, "alpha": 9.0}],
}  # fmt: skip
"""Options away from the defaults, of every method that does not let a wrong answer win by its
nature.
"""


@pytest.mark.parametrize("name", sorted(CHOSEN))
def test_other_options_let_a_wrong_answer_win_only_where_that_is_said(name: str) -> None:
    for options in CHOSEN[name]:
        method, found = build(name, **options), False
        for number, (right, lengths) in enumerate([*KINDS.values(), *drawn_groups(5, 100)]):
            # wrong ones may be cut
            ends: list[Finish] = ["stop" if good or number % 2 else "length" for good in right]
            for known in knowns(name):
                texts = (
                    [f"{'t' * n}</think>{'a' * n}" for n in lengths]
                    if name == "grlc"
                    else TEXTS.get(name, SAID)
                )
                got = trained_on(method, right, lengths, known, finish=ends, texts=texts)
                hit = np.array(right, dtype=bool)
                found |= bool(
                    hit.any() and not hit.all() and got[~hit].max() > got[hit].min() + 1e-9
                )
        assert found == bool(method.wrong_may_win_if), (options, method.wrong_may_win_if)


def test_the_added_form_pays_a_wrong_answer_at_most_as_much() -> None:
    for right, lengths in drawn_groups(6, 100):
        got = trained_on(
            build("l1_max", form="added"), right, lengths, note={"budget": 400, "exact": False}
        )
        assert (
            got[np.array(right) == 1].min(initial=1.0)
            >= 1.0
            >= got[np.array(right) == 0].max(initial=0.0)
        )


def test_an_over_long_right_answer_of_the_cosine_loses_to_any_wrong_one() -> None:
    late, early = methods.rewards("cosine", [1, 0], [990, 100], max_tokens=1000)
    assert (late, early) == (-10.0, pytest.approx(-9.7553, abs=1e-4))


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_groups_of_each_kind(name: str, kind: str) -> None:
    """Equal outcomes are paid alike, and a group that is all wrong teaches nothing but length."""
    right, lengths = KINDS[kind]
    got = trained_on(build(name), right, lengths)
    if kind == "equal lengths":
        assert np.ptp(got[[0, 2, 3]]) == pytest.approx(0, abs=1e-9) or name in (
            "gfpo",
            "adapt_think",
        )
    if kind == "all wrong" and name not in PRICED | BRANCHING | {"jet"}:
        assert np.ptp(got) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_what_was_cut_off_is_wrong_whatever_it_says(name: str) -> None:
    method, finish = build(name), ["stop", "stop", "length", "stop"]
    said = [
        methods.reward(method, asked(c, L, finish), KNOWN).rewards
        for c in ([1, 0, 1, 1], [1, 0, 0, 1])
    ]  # type: ignore[arg-type]
    assert np.array_equal(said[0], said[1])
