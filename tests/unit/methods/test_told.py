"""Methods that tell a budget or an effort, open a response or cut it: against worked numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_efr import methods
from megatron_efr.methods import Ask, Sampled, State, Visit
from megatron_efr.scripts import Budget, Opened
from megatron_efr.types import Part, Prompt
from tests.groups import KNOWN, graded
from tests.judged import VECTORS, C, L, build, close, drawn_groups, outputs, rewarded, trained_on

pytestmark = pytest.mark.alike


def visit(seed: int, name: str = "p", samples: int = 4) -> Visit:
    return Visit(graded([1], [1], prompt=Prompt(name, (1,), "q", "1")).group.prompt, samples, seed)


@pytest.mark.parametrize(
    ("name", "options", "exact", "key"),
    [
        ("l1_exact", {}, True, "rewards"),
        ("l1_exact", {"alpha": 1 / 3000}, True, "first_release_alpha_1_over_3000"),
        ("l1_max", {}, False, "paper"),
        ("l1_max", {"form": "multiplied"}, False, "code_head_multiplier"),
        ("l1_max", {"form": "added"}, False, "code_head_added"),
        ("l1_max", {"form": "multiplied", "alpha": 1 / 500}, False, "code_first_release"),
    ],
)
def test_worked_rewards_of_a_budget(
    name: str, options: dict[str, Any], exact: bool, key: str
) -> None:
    note = {"budget": 400, "exact": exact}
    assert trained_on(build(name, **options), C, L, note=note) == close(outputs(name)[key])
    first_release = build("l1_max", form="multiplied", alpha=1 / 500, exact_alpha=1 / 3000)
    assert trained_on(first_release, [1], [900], note={"budget": 400, "exact": True}) == close(
        [1 - 500 / 3000]
    )
    exactly = trained_on(build("l1_max"), C, L, note={"budget": 400, "exact": True})
    assert exactly == close(outputs("l1_exact")["rewards"])


def test_a_budget_is_told_as_the_seed_of_the_visit_has_it() -> None:
    method = build("l1_exact", shortest=10, longest=12)
    asks = [method.ask(visit(seed), KNOWN) for seed in range(300)]
    assert {ask.note["budget"] for ask in asks} == {10, 11, 12}
    assert all(
        ask.suffix == (f" Think for {ask.note['budget']} tokens.") and not ask.scripts
        for ask in asks
    )
    assert asks == [method.ask(visit(seed), KNOWN) for seed in range(300)]
    both = [build("l1_max", exact=0.25).ask(visit(seed), KNOWN) for seed in range(1000)]
    assert np.mean([ask.note["exact"] for ask in both]) == pytest.approx(0.25, abs=0.05)
    assert all(("maximum" in ask.suffix) != ask.note["exact"] for ask in both)
    assert all(100 <= ask.note["budget"] <= 4000 for ask in both)


def test_a_level_of_effort_is_an_alpha() -> None:
    method = build("experimental.effort", medium=0.2)
    for level, alpha in (("low", 0.4), ("medium", 0.2), ("high", 0.0)):
        expected = methods.rewards("efr", C, L, alpha=alpha)
        assert np.array_equal(trained_on(method, C, L, note={"level": level}), expected)
    asks = [method.ask(visit(seed), KNOWN) for seed in range(600)]
    said = [ask.note["level"] for ask in asks]
    assert all(abs(said.count(level) - 200) < 50 for level in ("low", "medium", "high"))
    assert all(ask.suffix == f" Effort: {ask.note['level']}." for ask in asks)


def test_levels_of_effort_have_words_of_their_own() -> None:
    method = build("experimental.effort", suffix=";{level}", words=["1", "2", "3"])
    asks = [method.ask(visit(seed), KNOWN) for seed in range(30)]
    said = {"low": ";1", "medium": ";2", "high": ";3"}
    assert {ask.note["level"]: ask.suffix for ask in asks} == said
    assert [ask.suffix for ask in method.longest_asks(visit(0), KNOWN)] == list(said.values())


def test_alpha_follows_the_accuracy_of_the_start_within_its_tolerance() -> None:
    """At 1/2 - 1/4 the accuracy is lost; nothing happens between samplings, and one is looked at
    once.
    """
    method = build("experimental.target", alpha=0.1, most=0.4, up=0.2, down=0.25, tolerance=0.25)
    state: State = {}
    alphas = []
    for monitored, right in (
        (0, 2),
        (0, 2),
        (10, 1),
        (20, 3),
        (20, 3),
        (30, 4),
        (40, 0),
        (50, 0),
        (60, 0),
        (70, 1),
    ):
        sampled = Sampled((1, 2, 3, 4), tuple(n < right for n in range(4)))
        known = KNOWN._replace(state=state, monitor={"p": sampled}, monitored=monitored)
        (given,) = rewarded(method, [(C, L)], known)
        alphas.append(method.learn(state, [given], known)["alpha"])
        assert np.array_equal(given.rewards, methods.rewards("efr", C, L, alpha=alphas[-1])), (
            "at once"
        )
        state = json.loads(json.dumps(method.learn(state, [given], known)))
    assert alphas == pytest.approx([0.1, 0.1, 0.3, 0.4, 0.4, 0.4, 0.15, 0, 0, 0.2], abs=1e-12)
    assert state == {"alpha": pytest.approx(0.2), "start": 0.5, "looked": 70}
    # 12 of 50 is 0.02 below 13 of 50, though 0.26 - 0.02 > 0.24 in floating point; 11 of 50 is lost
    for right, alpha in ((12, 0.55), (11, 0.4)):
        before = {"alpha": 0.5, "start": 13 / 50, "looked": 0}
        sampled = Sampled((1,) * 50, tuple(n < right for n in range(50)))
        known = KNOWN._replace(state=before, monitor={"p": sampled}, monitored=10)
        assert build("experimental.target").learn(before, [], known)["alpha"] == pytest.approx(
            alpha
        )


def test_a_largest_budget_never_pays_a_wrong_answer_more() -> None:
    for form in ("paper", "multiplied"):
        for right, lengths in drawn_groups(4, 40):
            got = trained_on(
                build("l1_max", form=form), right, lengths, note={"budget": 400, "exact": False}
            )
            assert np.all(got[~np.array(right, dtype=bool)] == 0)
            assert np.all((got >= 0) & (got <= 1))


def test_responses_are_opened_and_thoughts_cut() -> None:
    (*scripts,) = build("asrr").ask(visit(0), KNOWN).scripts
    assert scripts == [Opened(opening="Okay, I have finished thinking.\n</think>\n\n")] * 4
    (*scripts,) = build("elastic", thought=10, answer=5).ask(visit(0), KNOWN).scripts
    assert scripts == [Budget(most=10, answer=5, end="</think>", cut="\n</think>\n\n")] * 4


def test_a_response_that_ends_within_its_thought_has_no_answer() -> None:
    thought, cut = Part("thought", 0, 4, "stop"), Part("cut", 4, 5, "forced")
    ways = [(thought,), (thought._replace(ending="length"), cut, Part("answer", 5, 7, "stop")), ()]
    group = graded([1, 1, 1], [4, 7, 7])
    pairs = zip(group.group.responses, ways, strict=True)
    responses = tuple(replace(each, parts=parts) for each, parts in pairs)
    judged = replace(group, group=replace(group.group, responses=responses))
    assert build("elastic").rewards(judged, KNOWN).tolist() == [0.0, 1.0, 1.0]


def test_the_second_stage_tells_the_length_that_a_prompt_took() -> None:
    first, second = KNOWN._replace(step=4), KNOWN._replace(step=5, state={"targets": {"p": 250.0}})
    method, vector = build("lapo", second_from=5), outputs("lapo_stage2")
    assert trained_on(method, C, L, first, note={}) == close(outputs("lapo_stage1")["rewards"])
    assert trained_on(method, C, L, second, note={"target": 250.0}) == close(
        vector["paper_weight_0_7"]
    )
    weighed = build("lapo", second_from=5, weight=0.8)
    assert trained_on(weighed, C, L, second, note={"target": 250.0}) == close(
        vector["code_weight_0_8"]
    )
    median = trained_on(
        method, C, L, second, note={"target": outputs("lapo_stage1")["median_for_stage2"]}
    )
    assert np.array_equal(trained_on(method, C, L, second, note={}), median)

    assert method.ask(visit(0), first._replace(state=second.state)) == Ask()
    assert method.ask(visit(0, "other"), second) == Ask()
    told = method.ask(visit(0), second)
    assert told.note == {"target": 250.0}
    assert told.scripts == (Opened(opening="I will answer the question with 250 tokens.\n"),) * 4

    groups = rewarded(method, [(C, L)], note={})
    assert method.learn({}, groups, first) == {"targets": {"p": 300.0}}
    # the last visit's
    assert method.learn({"targets": {"p": 250.0}}, groups, first) == {"targets": {"p": 300.0}}
    # the lower one
    assert method.learn({"targets": {"p": 250.0}}, groups, second) == {"targets": {"p": 250.0}}
    assert method.learn({"targets": {"p": 350.0}}, groups, second) == {"targets": {"p": 300.0}}
    none_right = rewarded(method, [([0] * 4, L)], note={})
    assert method.learn({"targets": {"p": 350.0}}, none_right, second) == {"targets": {"p": 350.0}}


def test_modes_are_read_in_the_text() -> None:
    vector = VECTORS["autothink"]
    thinks, closed = "...\nFirst, 2", "...\n\n</think>\n4"
    base = trained_on(build("autothink", stage=2), C, L, texts=[thinks, closed])
    assert base == close(vector["outputs"]["base"])
    assert trained_on(build("autothink", stage=3), C, L, texts=[thinks, closed]) == close(
        vector["outputs"]["stage3_rewards"]
    )
    often = [thinks, thinks, thinks, closed]
    assert trained_on(build("autothink"), C, L, texts=often) == close(
        vector["outputs"]["stage1_rewards"]
    )
    seldom = trained_on(build("autothink"), C, L, texts=[closed, closed, closed, thinks])
    assert seldom == close([1.5, -1.5, 1.5, 1.0])
    # the share is the whole iteration's
    two = rewarded(build("autothink"), [(C, L), (C, L)], texts=[thinks, closed])
    assert two[0].rewards == close(vector["outputs"]["base"])
    grlc = VECTORS["grlc"]
    parts = zip(grlc["inputs"]["think_len"], grlc["inputs"]["answer_len"], strict=True)
    texts = ["a" * thinking + "</think>" + "b" * answer for thinking, answer in parts]
    assert trained_on(build("grlc"), C, L, texts=texts) == close(grlc["outputs"]["scores"])
    # the third was cut off in its thought: an empty answer is not the shortest, and space is no
    # answer
    pairs = zip([400, 500, 1000, 600], [100, 200, 0, 150], strict=True)
    parts = ["t" * thinking + "</think>\n\n" + "a" * answer + " " for thinking, answer in pairs]
    weights = np.array([1, 5 / 6, 0, 2 / 3]) - 0.625 + np.array([0.5, 0, 1, 0.25]) - 0.4375
    cut_off = trained_on(build("grlc"), [1, 1, 0, 0], [500, 700, 1000, 750], texts=parts)
    assert cut_off == close(np.array([2, 1, 0, 0]) + weights / 2)
    tags = ["[Easy] 4", "[Hard] 4", " [Easy] 4", "[Easy] 4"]
    adactrl = VECTORS["adactrl"]["outputs"]
    assert trained_on(build("adactrl"), C, L, texts=tags) == close(adactrl["rewards"])
    hard = trained_on(
        build("adactrl", threshold=0.75), C, L, texts=["[Hard] 4", "4", "[Easy] 4", "[Hard] 4"]
    )
    assert hard == close([1.5, -0.5, 1.0 + adactrl["length_part"][2] / 2, 1.5])
