"""Every built-in method against worked numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_efr import methods
from megatron_efr.config import ConfigError
from megatron_efr.methods import METHODS, Ask, Method, Monitor, Sampled, Seen, State, Visit
from megatron_efr.methods.monitored import LaserD, repetitive
from megatron_efr.methods.relative import GDPO, GFPO, qglas_advantages
from megatron_efr.scripts import Budget, Opened
from megatron_efr.types import Part, Prompt
from tests.groups import KNOWN, graded
from tests.judged import VECTORS, C, L, build, close, drawn_groups, outputs, rewarded, trained_on

pytestmark = pytest.mark.alike


# -- worked numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "vector", "key"),
    [
        ("efr", {"alpha": 0.2}, "efr", "rewards"),
        ("shorterbetter", {}, "shorterbetter", "rewards"),
        ("kimi", {"weight": 0.4}, "kimi", "rewards"),
        ("lapo", {}, "lapo_stage1", "rewards"),
        ("prime_rl", {}, "prime_rl", "rewards"),
        ("overlong", {"max_tokens": 1000, "cache": 400}, "overlong", "rewards_plus_minus_1"),
        ("thinkprune", {"limit": 400}, "thinkprune", "rewards"),
        ("asrr", {"tau": 0.5}, "asrr", "rewards"),
        ("asrr", {}, "asrr", "tau1_p_below"),
        ("elastic", {}, "elastic", "rewards"),
        ("cosine", {"max_tokens": 1000}, "cosine", "rewards"),
        (
            "cosine",
            {"max_tokens": 1000, "right_short": 1, "right_long": 0.5, "wrong_short": -1, "wrong_long": -0.5,
             "exceeded": None},
            "cosine", "trl_defaults",
        ),
        ("laser", {"target": 400}, "laser", "rewards"),
        ("dler", {"limit": 400}, "dler", "paper_rewards_A"),
        ("dler", {"limit": 400, "over_limit": 0.1}, "dler", "code_rewards_A"),
        ("da_dler", {"easy": 200, "hard": 400}, "da_dler", "rewards"),
        ("experimental.alp", {"beta": 1e-4}, "alp", "rewards"),
        ("experimental.gr3", {}, "gr3", "rewards"),
    ],
)  # fmt: skip
def test_worked_rewards(name: str, options: dict[str, Any], vector: str, key: str) -> None:
    got = methods.rewards(name, C, L, **options)
    assert got == close(outputs(vector)[key])
    # as a run has them, and the responses in another order
    assert np.array_equal(build(name, **options).rewards(graded(C, L), KNOWN), got)
    turned = methods.rewards(name, C[::-1], L[::-1], **options)
    assert turned[::-1] == pytest.approx(got, abs=1e-12)


def test_worked_rewards_of_groups_of_other_kinds() -> None:
    assert methods.rewards("efr", [0, 1, 0, 0], L, alpha=0.2) == close(outputs("efr")["one_correct"])
    assert methods.rewards("efr", [1, 1, 1, 1], L, alpha=0.2) == close(outputs("efr")["all_correct"])
    assert methods.rewards("shorterbetter", [0] * 4, L) == close(outputs("shorterbetter")["none_correct_rewards"])
    assert methods.rewards("kimi", C, [7] * 4) == close(np.add(C, outputs("kimi")["equal_lengths"]))
    assert methods.rewards("lapo", [0, 1, 0, 0], L) == close(outputs("lapo_stage1")["one_correct_rewards"])
    assert methods.rewards("cosine", [1, 1], [984, 983], max_tokens=1000) == close(outputs("cosine")["at_984_and_983"])
    cut = methods.rewards("stop_properly", C, L, truncated=[False, False, True, False])
    assert cut == close(outputs("stop_properly")["rewards"])
    overlong = {"max_tokens": 1000, "cache": 400}
    longer = [500, 700, 1000, 1100]
    assert methods.rewards("overlong", [1] * 4, longer, **overlong) - 1 == close(outputs("overlong")["second_capped"])
    assert methods.rewards("asrr", [1] * 4, L) == close(outputs("asrr")["tau1_all_correct_rewards"])
    uncapped = methods.rewards("overlong", [1] * 4, longer, floor=False, **overlong)
    assert uncapped - 1 == close(outputs("overlong")["second_verl_nemo_uncapped"])


def test_limits_are_the_rollouts_where_they_are_left_out() -> None:
    """Of 1,000 tokens: a fifth of them is DAPO's 4,096 of 20,480."""
    got = methods.rewards("overlong", C, L, max_new_tokens=1000)
    assert got.tolist() == pytest.approx([1.0, -1.5, 1.0, 1.0])
    assert np.array_equal(got, build("overlong", tokens=1000).rewards(graded(C, L), KNOWN._replace(limit=1000)))
    cosine = methods.rewards("cosine", C, L, max_tokens=1000)
    assert np.array_equal(methods.rewards("cosine", C, L, max_new_tokens=1000), cosine)
    assert methods.rewards("thinkprune", C, L, max_new_tokens=1000).tolist() == [1, 0, 1, 1]
    for name in ("overlong", "cosine", "thinkprune", "dler"):
        with pytest.raises(ConfigError, match="not set, and no max_new_tokens is given"):
            methods.rewards(name, C, L)


def monitored(**lengths: list[int]) -> dict[str, Sampled]:
    """A monitor set whose prompts are solved as their bands say, with right responses of these lengths."""
    others = {"high": 0, "medium": 1, "low": 3}  # wrong ones to each right one, far too long
    return {
        f"{band}-{i}": Sampled((length, *[16_000] * others[band]), (True, *[False] * others[band]))
        for band, each in lengths.items()
        for i, length in enumerate(each)
    }


def test_targets_follow_the_monitor_set() -> None:
    vector = VECTORS["laser_d_targets"]
    lengths, method = vector["inputs"]["monitor_lengths_by_band"], build("laser_d")
    assert isinstance(method, LaserD)
    assert method.targets(monitored(**lengths), 16_384) == vector["outputs"]["targets"]
    assert method.samplings.monitor == Monitor(500, 8, 20)
    # the released code takes the wrong ones' lengths too, which are a half of those of medium, and most of low
    released = build("laser_d", coverage="all")
    assert isinstance(released, LaserD)
    made = released.targets(monitored(**lengths), 16_384)
    assert made == {"high": 1024, "medium": 9216, "low": 16_384}
    assert method.targets({}, 16_384) == {"high": None, "medium": None, "low": None}
    assert method.targets(monitored(low=[20_000]), 16_384)["low"] is None


@pytest.mark.parametrize("name", ["laser_d", "laser_de"])
def test_worked_rewards_of_a_target_by_difficulty(name: str) -> None:
    targets, expected = VECTORS[name]["inputs"]["targets"], VECTORS[name]["outputs"]["rewards"]
    method = build(name, lowest=50, step=50)
    known = KNOWN._replace(monitor=monitored(**{band: [target] for band, target in targets.items()}))
    assert trained_on(method, C, L, known) == close(expected)
    repeating = method.rewards(graded(C, L), known)  # one token, 900 times
    assert repeating == close(VECTORS["laser_d"]["outputs"]["rewards"])
    assert trained_on(method, C, L) == close([1.5, -0.5, 1.5, 1.5]), "no target: each right answer is within it"
    cut = trained_on(method, [1, 0, 0, 0], [300, 900, 500, 120], known, finish=["length", "stop", "stop", "stop"])
    assert cut == close([-1.0, expected[1], -0.5, -0.5]), "none is right: the target is that of low"
    low = KNOWN._replace(monitor=monitored(low=[200]))
    cut = trained_on(method, [1, 0, 0, 0], [300, 900, 500, 120], low, finish=["length", "stop", "stop", "stop"])
    assert cut == close([-0.5, 0, 0, -0.5] if name == "laser_de" else [-1.0, -0.5, -0.5, -0.5])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (range(300), False),
        ([*range(300), *range(296, 300)], False),  # four tokens twice: in a long response thrice is needed
        ([*range(300), *range(292, 300)], True),  # eight tokens twice
        ([*range(300), 296, 297, 298, 299, 999, 296, 297, 298, 299], True),
        ([*range(4), *range(100, 220), *range(4), *range(220, 340), *range(4)], False),  # thrice, but far apart
        ([7] * 300, True),  # eight times one token, twice
        ([*range(150), *range(146, 150)], True),  # four tokens twice in fewer than 200
        ([*range(50), 47, 48, 49], True),
        ([*range(50), 48, 49], False),
        ([1, 2, 3, 4, 5, 1, 2, 6, 7], False),  # a third of 9 apart
        ([1, 2, 1, 2, 5, 6, 7, 8, 9], True),
        ([1, 1, 1, 1], False),  # too short to tell
        ([1, 1, 1, 1, 2], False),  # of 5 // 3 = 1 tokens, and next to each other is 1
        ([], False),
    ],
)
def test_repetitive_responses(tokens: list[int], expected: bool) -> None:
    assert repetitive(list(tokens)) == expected


def test_the_best_solved_groups_alone_are_shortened() -> None:
    vector = VECTORS["grpo_lambda"]
    groups = vector["inputs"]["groups"]
    got = rewarded(build("grpo_lambda"), [(group["c"], group["l"]) for group in groups.values()])
    for group, expected in zip(got, vector["outputs"]["rewards"].values(), strict=True):
        assert group.rewards == close(expected)
    all_of_them = rewarded(build("grpo_lambda", share=1.0), [(group["c"], group["l"]) for group in groups.values()])
    for group, given in zip(all_of_them, groups.values(), strict=True):
        assert np.array_equal(group.rewards, methods.rewards("efr", given["c"], given["l"], alpha=0.2))


def test_worked_advantages_of_a_groups_own() -> None:
    assert trained_on(build("twyn"), C, L) == close(outputs("twyn")["advantage"])
    lengths = VECTORS["gfpo"]["inputs"]["l"]
    gfpo = outputs("gfpo")
    assert trained_on(build("gfpo", keep=3), C, lengths) == close(gfpo["advantage_shortest"])
    by_reward = build("gfpo", keep=3, by="reward_per_token")
    assert trained_on(by_reward, C, lengths) == close(gfpo["advantage_reward_per_token"])
    assert trained_on(build("gfpo", keep=2), C, L) == close(gfpo["original_l_k2_advantage"])
    gdpo = outputs("gdpo")
    assert trained_on(build("gdpo", limit=40_000 - 1, over="nothing", short=0.0), C, L) == close([0.5, -1.5, 0.5, 0.5])
    for over, key in (
        ("nothing", "summed_group_z"),
        ("tokens", "verl_token_whitened"),
        ("responses", "nemo_trl_batch_z_single_group"),
    ):
        # TRL adds 1e-4 to the deviation
        assert trained_on(build("gdpo", limit=400, over=over), C, L) == pytest.approx(np.array(gdpo[key]), abs=2e-4)
    qglas = VECTORS["qglas"]
    assert trained_on(build("qglas"), C, L) == close(qglas["outputs"]["binary_quality"])
    quality = np.array(qglas["inputs"]["quality"])
    assert qglas_advantages(quality, np.array(L, float), 0.3, 0.6, 0.5) == close(qglas["outputs"]["dense_quality"])


def test_brevity_is_normalised_over_the_whole_iteration() -> None:
    groups = [(C, L), ([0, 1, 0, 0], [400, 200, 400, 401])]
    method = GDPO(limit=400)
    credits = method.credits(rewarded(method, groups), KNOWN)
    flat = np.concatenate([credit.advantage for credit in credits])
    assert [len(credit.advantage) for credit in credits] == [4, 4]
    assert (flat.mean(), flat.std(ddof=1)) == (pytest.approx(0, abs=1e-12), pytest.approx(1, abs=1e-4))


# -- what is told, opened and said -------------------------------------------------------------------------------------


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
def test_worked_rewards_of_a_budget(name: str, options: dict[str, Any], exact: bool, key: str) -> None:
    note = {"budget": 400, "exact": exact}
    assert trained_on(build(name, **options), C, L, note=note) == close(outputs(name)[key])
    first_release = build("l1_max", form="multiplied", alpha=1 / 500, exact_alpha=1 / 3000)
    assert trained_on(first_release, [1], [900], note={"budget": 400, "exact": True}) == close([1 - 500 / 3000])
    exactly = trained_on(build("l1_max"), C, L, note={"budget": 400, "exact": True})
    assert exactly == close(outputs("l1_exact")["rewards"])


def test_a_budget_is_told_as_the_seed_of_the_visit_has_it() -> None:
    method = build("l1_exact", shortest=10, longest=12)
    asks = [method.ask(visit(seed), KNOWN) for seed in range(300)]
    assert {ask.note["budget"] for ask in asks} == {10, 11, 12}
    assert all(ask.suffix == f" Think for {ask.note['budget']} tokens." and not ask.scripts for ask in asks)
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
    """At 1/2 - 1/4 the accuracy is lost; nothing happens between samplings, and one is looked at once."""
    method = build("experimental.target", alpha=0.1, most=0.4, up=0.2, down=0.25, tolerance=0.25)
    state: State = {}
    alphas = []
    for monitored, right in ((0, 2), (0, 2), (10, 1), (20, 3), (20, 3), (30, 4), (40, 0), (50, 0), (60, 0), (70, 1)):
        sampled = Sampled((1, 2, 3, 4), tuple(n < right for n in range(4)))
        known = KNOWN._replace(state=state, monitor={"p": sampled}, monitored=monitored)
        (given,) = rewarded(method, [(C, L)], known)
        alphas.append(method.learn(state, [given], known)["alpha"])
        assert np.array_equal(given.rewards, methods.rewards("efr", C, L, alpha=alphas[-1])), "at once"
        state = json.loads(json.dumps(method.learn(state, [given], known)))
    assert alphas == pytest.approx([0.1, 0.1, 0.3, 0.4, 0.4, 0.4, 0.15, 0, 0, 0.2], abs=1e-12)
    assert state == {"alpha": pytest.approx(0.2), "start": 0.5, "looked": 70}
    # 12 of 50 is 0.02 below 13 of 50, though 0.26 - 0.02 > 0.24 in floating point; 11 of 50 is lost
    for right, alpha in ((12, 0.55), (11, 0.4)):
        before = {"alpha": 0.5, "start": 13 / 50, "looked": 0}
        sampled = Sampled((1,) * 50, tuple(n < right for n in range(50)))
        known = KNOWN._replace(state=before, monitor={"p": sampled}, monitored=10)
        assert build("experimental.target").learn(before, [], known)["alpha"] == pytest.approx(alpha)


def test_a_largest_budget_never_pays_a_wrong_answer_more() -> None:
    for form in ("paper", "multiplied"):
        for right, lengths in drawn_groups(4, 40):
            got = trained_on(build("l1_max", form=form), right, lengths, note={"budget": 400, "exact": False})
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
    assert trained_on(method, C, L, second, note={"target": 250.0}) == close(vector["paper_weight_0_7"])
    weighed = build("lapo", second_from=5, weight=0.8)
    assert trained_on(weighed, C, L, second, note={"target": 250.0}) == close(vector["code_weight_0_8"])
    median = trained_on(method, C, L, second, note={"target": outputs("lapo_stage1")["median_for_stage2"]})
    assert np.array_equal(trained_on(method, C, L, second, note={}), median)

    assert method.ask(visit(0), first._replace(state=second.state)) == Ask()
    assert method.ask(visit(0, "other"), second) == Ask()
    told = method.ask(visit(0), second)
    assert told.note == {"target": 250.0}
    assert told.scripts == (Opened(opening="I will answer the question with 250 tokens.\n"),) * 4

    groups = rewarded(method, [(C, L)], note={})
    assert method.learn({}, groups, first) == {"targets": {"p": 300.0}}
    assert method.learn({"targets": {"p": 250.0}}, groups, first) == {"targets": {"p": 300.0}}  # the last visit's
    assert method.learn({"targets": {"p": 250.0}}, groups, second) == {"targets": {"p": 250.0}}  # the lower one
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
    assert trained_on(build("autothink"), C, L, texts=often) == close(vector["outputs"]["stage1_rewards"])
    seldom = trained_on(build("autothink"), C, L, texts=[closed, closed, closed, thinks])
    assert seldom == close([1.5, -1.5, 1.5, 1.0])
    # the share is the whole iteration's
    two = rewarded(build("autothink"), [(C, L), (C, L)], texts=[thinks, closed])
    assert two[0].rewards == close(vector["outputs"]["base"])
    grlc = VECTORS["grlc"]
    parts = zip(grlc["inputs"]["think_len"], grlc["inputs"]["answer_len"], strict=True)
    texts = ["a" * thinking + "</think>" + "b" * answer for thinking, answer in parts]
    assert trained_on(build("grlc"), C, L, texts=texts) == close(grlc["outputs"]["scores"])
    # the third was cut off in its thought: an empty answer is not the shortest, and space is no answer
    pairs = zip([400, 500, 1000, 600], [100, 200, 0, 150], strict=True)
    parts = ["t" * thinking + "</think>\n\n" + "a" * answer + " " for thinking, answer in pairs]
    weights = np.array([1, 5 / 6, 0, 2 / 3]) - 0.625 + np.array([0.5, 0, 1, 0.25]) - 0.4375
    cut_off = trained_on(build("grlc"), [1, 1, 0, 0], [500, 700, 1000, 750], texts=parts)
    assert cut_off == close(np.array([2, 1, 0, 0]) + weights / 2)
    tags = ["[Easy] 4", "[Hard] 4", " [Easy] 4", "[Easy] 4"]
    adactrl = VECTORS["adactrl"]["outputs"]
    assert trained_on(build("adactrl"), C, L, texts=tags) == close(adactrl["rewards"])
    hard = trained_on(build("adactrl", threshold=0.75), C, L, texts=["[Hard] 4", "4", "[Easy] 4", "[Hard] 4"])
    assert hard == close([1.5, -0.5, 1.0 + adactrl["length_part"][2] / 2, 1.5])


# -- memory ------------------------------------------------------------------------------------------------------------


def test_worked_rewards_against_a_prompts_history() -> None:
    seen = Seen(visits=3, responses=12, right=5, right_tokens=2000, shortest_right=250, last_step=7)
    known = KNOWN._replace(history={"p": seen})
    assert trained_on(build("hapo"), C, L, known) == close(outputs("hapo")["rewards"])
    assert trained_on(build("hapo"), C, L) == close(outputs("hapo")["rewards_h_unset"])
    mean = trained_on(build("hapo", history="mean"), C, L, known)  # of 400 tokens
    assert mean == close([1 + np.cos(np.pi * 3 / 8), -1, 1 + np.cos(np.pi * 5 / 8), 1 + np.cos(np.pi * 0.15)])
    unsolved = KNOWN._replace(history={"p": seen._replace(right=0, right_tokens=0, shortest_right=None)})
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
    (least,) = rewarded(method, [([1] * 7 + [0] * 13, list(range(1, 21)))], KNOWN._replace(state={"best": 0.4}))
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
    longest = build("leash", target=400, over="max").learn(known.state, rewarded(leash, [(C, L)]), known)
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
    assert method.learn(state | {"accuracies": [0.65]}, groups, known)["alpha"] == pytest.approx(0.095)
    assert method.learn(state, groups, known._replace(step=200))["alpha"] == 0.1
    none_right = method.learn({}, rewarded(method, [([0] * 4, L)]), KNOWN)
    assert (none_right["length"], none_right["accuracy"]) == (None, 0.0)


def test_easier_prompts_keep_fewer_responses() -> None:
    method = build("gfpo", keep=8, adaptive=True, samples=16)
    state = {"iterations": 10, "solved": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]}
    lengths = list(range(10, 26))
    for right, kept in ((1, 8), (4, 8), (9, 6), (13, 4)):
        correct = [i % 2 == 1 for i in range(16)] if right == 8 else [True] * right + [False] * (16 - right)
        correct[0], correct[15] = False, True  # the shortest is wrong
        made = trained_on(method, correct, lengths, KNOWN._replace(state=state))
        unlike_shortest = [i for i in range(kept) if correct[i] != correct[0]]
        assert np.count_nonzero(made) == (kept if unlike_shortest else 0), right
    assert isinstance(method, GFPO)
    early = trained_on(method, [False] + [True] * 15, lengths, KNOWN._replace(state=state | {"iterations": 9}))
    assert np.count_nonzero(early) == 8
    after = method.learn(state, rewarded(method, [([1] * 12 + [0] * 4, lengths)]), KNOWN)
    assert (after["iterations"], after["solved"][-1]) == (11, 0.75)


def learn_from(method: Method, knowledge: methods.Knowledge, first: int, last: int) -> list[np.ndarray]:
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
        made += [group.rewards for group in settled] if credits is None else [each.advantage for each in credits]
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
