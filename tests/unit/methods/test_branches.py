"""Methods that have responses left early: worked numbers, and the place of each credit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_efr import methods
from megatron_efr.config import ConfigError
from megatron_efr.methods import Method, Visit
from megatron_efr.methods.branching import JET, brpo_advantages, s_grpo_rewards
from megatron_efr.types import Credited, Grade, Graded
from tests.groups import KNOWN, graded
from tests.judged import VECTORS, C, L, branched, build, close, outputs

pytestmark = pytest.mark.alike

THOUGHT = 50
"""Tokens of the thoughts in these tests; one more ends them."""


def credited(method: Method, group: Graded) -> Credited:
    """The group with the method's own credit: that it fits the group is checked when this is
    made.
    """
    rewarded = methods.reward(method, group, KNOWN)
    (credit,) = method.credits([rewarded], KNOWN) or []
    return Credited(rewarded, credit)


def tried(
    method: Method, right: Sequence[int], verdicts: Sequence[Sequence[int]], tokens: int = THOUGHT
) -> Credited:
    """Thoughts of so many tokens, and the verdicts on them and on their early answers."""
    return credited(method, branched(graded(right, [tokens + 1] * len(right)), method, verdicts))


def anytime(**options: Any) -> Method:
    return build("anytime", **({"budgets": [10, 20, 30, 40], "answer_tokens": 5} | options))


@pytest.mark.parametrize(
    ("prior", "key"), [("uniform", "uniform"), ("linear", "linear"), ("last", "base")]
)
def test_worked_advantages_of_budgets(prior: str, key: str) -> None:
    vector = VECTORS["anytime_brpo"]
    scores = np.array(vector["inputs"]["score_mean_of_4_summaries"])
    method = anytime(prior=prior)
    weights = {"uniform": [0.25] * 4, "linear": [0.1, 0.2, 0.3, 0.4], "last": [0, 0, 0, 1.0]}[prior]
    wanted = np.array(vector["outputs"][key])
    assert brpo_advantages(scores, np.array(weights)) == close(wanted)

    verdicts = [
        [right for score in row for right in [1] * int(4 * score) + [0] * int(4 - 4 * score)]
        for row in scores
    ]
    made = tried(method, [0, 1], verdicts, tokens=40)
    assert made.rewarded.rewards == close(scores @ weights)
    credit = made.credit
    assert credit.per_token is not None
    assert credit.branches is not None
    for row, base, added in zip(wanted, credit.advantage, credit.per_token, strict=True):
        assert base + added[:40] == close(np.repeat(row, 10))
    answers = credit.branches[0].reshape(4, 4)
    assert answers[1] == close(vector["outputs"]["summary_advantage_of_scores_1_0_0_0"])
    assert answers[[0, 3]] == close(np.zeros((2, 4)))


def test_a_thought_that_ends_is_answered_for_the_budgets_that_it_did_not_reach() -> None:
    """25 tokens reach two of four budgets; eight answers come after the end, of which four count
    for each budget.
    """
    method = anytime()
    verdicts = [[1] * 4 + [0] * 4 + [1, 1, 1, 1] + [0, 0, 0, 1]]
    made = tried(method, [1], verdicts, tokens=25)
    (response,) = made.group.responses
    assert [(branch.part, branch.at, len(branch.responses)) for branch in response.branches] == [
        ("summary", 10, 4), ("summary", 20, 4), ("ended", 26, 8)
    ]  # fmt: skip
    scores = np.array([[1.0, 0.0, 1.0, 0.25]])
    assert made.rewarded.rewards == close(scores.mean(-1))
    advantages = brpo_advantages(scores, np.full(4, 0.25))[0]
    credit = made.credit
    assert credit.per_token is not None
    assert credit.weight is not None
    assert credit.branches is not None
    assert credit.advantage[0] + credit.per_token[0] == close(
        np.repeat(advantages[:3], [10, 10, 6])
    )
    assert credit.weight[0].tolist() == [1.0] * 26, "with the token that ends the thought"
    after = np.array([1, 1, 1, 1, 0, 0, 0, 1]) - 5 / 8
    assert credit.branches[0] == close([0] * 8 + after.tolist())


def test_what_follows_a_thought_is_not_trained_on_and_a_second_end_is_wrong() -> None:
    method = anytime(budgets=[10, 20])
    group = branched(graded([1, 0], [31, 31]), method, [[1] * 8, [1] * 8])
    responses = [
        replace(
            each,
            parts=(
                each.parts[0]._replace(end=15, ending="until"),
                each.parts[0]._replace(start=15, end=31),
            ),
        )
        for each in group.group.responses
    ]
    texts = ["4", "4</think>", "4", "4", "4</think>4"]
    first = responses[0].branches
    said = [
        branch._replace(
            responses=tuple(replace(each, text=texts[k]) for k, each in enumerate(branch.responses))
        )
        for branch in first
    ]
    responses[0] = replace(responses[0], branches=tuple(said))
    group = replace(group, group=replace(group.group, responses=tuple(responses)))
    made = credited(method, group)
    assert made.credit.weight is not None
    assert [weight.tolist() for weight in made.credit.weight] == [[1.0] * 16 + [0.0] * 15] * 2
    # the cut holds one end already, so that an answer of a cut thought may hold no other
    assert made.rewarded.rewards == close([1.0, 1.0])
    strict = anytime(budgets=[10, 20], cut="So: ")
    assert strict.rewards(group, KNOWN) == close([0.75, 1.0])


def test_one_answer_for_each_budget_is_compared_with_the_groups() -> None:
    made = tried(anytime(answers=1), [1, 0], [[1, 0, 1, 1], [0, 0, 1, 0]], tokens=45)
    assert made.credit.branches is not None
    assert np.array(made.credit.branches) == close([[0.5, 0, 0, 0.5], [-0.5, 0, 0, -0.5]])


def test_worked_advantages_against_a_stop() -> None:
    vector = VECTORS["mrt_readme"]
    made = tried(build("mrt"), C, [[stopped] for stopped in vector["inputs"]["reward_if_stopped"]])
    assert made.credit.advantage == close(vector["outputs"]["advantage"])
    assert made.credit.branches is None
    four = tried(build("mrt", answers=4), [1, 0], [[1, 0, 0, 0], [1, 1, 1, 0]])
    assert four.credit.advantage == close([0.75, -0.75])
    assert tried(build("mrt"), [1], [[]], tokens=1).credit.advantage == close([1.0]), (
        "too short to be left"
    )


def test_worked_rewards_of_a_serial_group() -> None:
    serial, found = (
        VECTORS["s_grpo"]["inputs"]["correct_in_order_of_exit_full_last"],
        outputs("s_grpo"),
    )
    assert s_grpo_rewards(np.array(serial, dtype=bool)) == close(found["rewards"])
    method = build("s_grpo", exits=4)
    made = tried(method, [serial[-1], 0], [serial[:-1], [0] * 4])
    assert made.rewarded.rewards == close([found["rewards"][-1], 0])
    credit = made.credit
    assert credit.branches is not None
    assert credit.masked is not None
    assert [*credit.branches[0], credit.advantage[0]] == close(found["advantage"])
    assert (credit.masked.tolist(), len(credit.branches[1])) == ([False, True], 0), (
        "without a right answer: left out"
    )
    assert credit.beginnings


def test_worked_rewards_of_shortened_responses() -> None:
    vector = VECTORS["jet"]
    for name, group in vector["inputs"]["groups"].items():
        right, lengths = np.array(group["c"], dtype=bool), np.array(group["l"], dtype=float)
        got = JET().rule(right, lengths, np.ones(len(right), dtype=bool))
        assert got == close(vector["outputs"][f"paper_per_question_{name}"])
    assert JET().rule(np.zeros(2, dtype=bool), np.ones(2), np.array([True, False])).tolist() == [
        0.1,
        0.0,
    ]


def test_whole_and_shortened_responses_are_one_group() -> None:
    """A thought of 50 and its shares of 12, 25 and 37 tokens, each with an answer of 6; the second
    gave no answer.
    """
    method = build("jet", answer_tokens=6)
    made = tried(method, [1, 0], [[1, 0, 1], [0, 1, 0]])
    judged = made.graded
    silent = replace(
        judged, branches=(judged.branches[0], (Grade("no_answer"), *judged.branches[1][1:]))
    )
    lengths = np.array([51, 51, 18, 31, 43, 18, 31, 43.0])
    right = np.array([1, 0, 1, 0, 1, 0, 1, 0], dtype=bool)
    rewards = JET().rule(right, lengths, np.arange(8) != 5)
    wanted = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
    credit = credited(method, silent).credit
    assert credit.branches is not None
    assert np.concatenate([credit.advantage, *credit.branches]) == close(wanted)
    assert method.rewards(silent, KNOWN) == close(rewards[:2])
    assert credit.beginnings


def test_where_responses_are_left_is_a_function_of_the_visit() -> None:
    prompt = graded(C, L).group.prompt
    for name in ("mrt", "s_grpo"):
        method = build(name)
        one, again, other = (method.ask(Visit(prompt, 4, seed), KNOWN) for seed in (3, 3, 4))
        assert one == again != other
        found = branched(graded([1] * 4, [1000] * 4), method)
        places = [tuple(branch.at for branch in each.branches) for each in found.group.responses]
        assert len(set(places)) == 4, "each sample its own"
        assert all(0 < at < 999 for each in places for at in each)
        assert {len(each) for each in places} == {1 if name == "mrt" else 8}


def test_budgets_that_no_thought_reaches_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^method\.budgets: no thought reaches 8000 .* = 1000; raise that to 8000",
    ):
        build("anytime", tokens=1000)
    with pytest.raises(ConfigError, match=r"^method\.budgets: 20, 10 do not ascend"):
        build("anytime", budgets=[20, 10])
