"""Methods and algorithms together: options without sense, choices that undo a method, what goes
with what.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from megatron_efr import algorithms, methods
from megatron_efr.algorithms import rloo
from megatron_efr.config import AlgorithmConfig, ConfigError, RolloutConfig
from megatron_efr.methods import METHODS, Known, Outcomes
from megatron_efr.types import Credit, Rewarded
from tests.groups import KNOWN, graded
from tests.judged import C, L, asked, build, close, outputs, rewarded, trained_on

pytestmark = pytest.mark.alike


def test_dlers_recipe_is_an_algorithm() -> None:
    recipe = algorithm(
        name="dr_grpo", normalize="batch", aggregate="token", clip_high=0.28, dual_clip=10.0,
        kl="k3", beta=0.0005,
        dynamic_sampling=True,
    )  # fmt: skip
    methods.check_together("dler", build("dler", limit=4000), recipe)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "overlong",
            {"max_tokens": 2000},
            r"^method\.max_tokens: 2000 tokens, and no response has more than .* = 1000",
        ),
        ("overlong", {"cache": 2000}, r"^method\.cache: 2000 tokens are more than the limit, 1000"),
        ("cosine", {"max_tokens": 2000}, r"^method\.max_tokens: 2000 tokens"),
        ("thinkprune", {"limit": 1001}, r"^method\.limit: 1001 tokens.* set it to at most that"),
        ("dler", {"limit": 1001}, r"^method\.limit: 1001 tokens"),
        ("da_dler", {"easy": 10}, r"^method\.hard: 4000 tokens"),
        ("laser_d", {}, r"^method\.lowest: 1024 tokens, .* set it to less than that"),
        ("laser", {"target": 1000}, r"^method\.target: 1000 tokens.* set it to less than that"),
        ("leash", {}, r"^method\.target: 4096 tokens"),
        ("gdpo", {}, r"^method\.limit: 4000 tokens"),
        (
            "l1_exact",
            {"suffix": " Be brief."},
            r"^method\.suffix: the text tells nothing without \{budget\}",
        ),
        (
            "l1_max",
            {"exact_suffix": ""},
            r"^method\.exact_suffix: the text tells nothing without \{budget\}",
        ),
        (
            "lapo",
            {"opening": "Briefly. "},
            r"^method\.opening: the text tells nothing without \{budget\}",
        ),
        (
            "experimental.o1_pruner_online",
            {"least": 5.0},
            r"^method\.least: 5 is not below method\.most = 4",
        ),
        (
            "experimental.effort",
            {"suffix": "!"},
            r"^method\.suffix: the text tells nothing without \{level\}",
        ),
        (
            "experimental.effort",
            {"words": ["a", "b", "a"]},
            r"^method\.words: a, b, a: each level needs a word of its",
        ),
        ("lapo", {"low": 70.0, "high": 30.0}, r"^method\.low: 70 is not below method\.high = 30"),
        (
            "cosine",
            {"max_tokens": 16},
            r"^method\.margin: 16 tokens before the limit, 16, are all of it",
        ),
        (
            "experimental.target",
            {"alpha": 0.95},
            r"^method\.alpha: 0\.95 is above method\.most = 0\.9",
        ),
        (
            "leash",
            {"target": 400, "least": 0.5},
            r"^method\.start: 0\.1 is not between method\.least = 0\.5",
        ),
        (
            "leash",
            {"target": 400, "start": 2.0},
            r"^method\.start: 2 is not between .* method\.most = 1",
        ),
        (
            "da_dler",
            {"easy": 300, "hard": 200},
            r"^method\.easy: 300 tokens for easy prompts are more than .* = 200",
        ),
        ("qglas", {"low": 0.9}, r"^method\.low: 0\.9 is above method\.high = 0\.6"),
        ("acoer", {"budget": 100}, r"^method\.budget: 100 is below method\.least_budget = 512"),
        (
            "adactrl",
            {"easy": "[H"},
            r"^method\.hard: '\[Hard\]' cannot be told from method\.easy = '\[H'",
        ),
        (
            "elastic",
            {"thought": 700, "answer": 301},
            r"^method\.thought: 700 .* set max_new_tokens to 1001 or more",
        ),
        (
            "grpo_lambda",
            {"share": 0.2, "prompts": 4},
            r"^method\.share: 0\.2 of rollout\.prompts = 4 .* 1/4 or more",
        ),
        ("dler", {"over_limit": 0.1}, r"^method\.over_limit: 0\.1 .* set method\.limit below that"),
        ("dler", {"over_limit": 0.1, "limit": 1000}, r"^method\.over_limit: 0\.1"),
        (
            "gfpo",
            {"keep": 4},
            r"^method\.keep: 4 of rollout\.samples = 4 responses leaves none out",
        ),
        ("kimi", {"weight": 2}, r"^method\.weight: .*less than or equal to 1 \(got 2\)"),
        ("twyn", {"margins": 2}, r"^method\.margins: unknown key; did you mean margin"),
        ("acoer", {"budget": 0}, r"^method\.budget: .*greater than 0"),
        ("l1_exact", {}, r"^method\.longest: 4000 tokens"),
        (
            "l1_exact",
            {"shortest": 20, "longest": 10},
            r"^method\.shortest: 20 is above method\.longest = 10",
        ),
        ("hapo", {"history": "longest"}, r"^method\.history: .*'shortest' or 'mean'"),
    ],
)
def test_options_without_sense_are_refused_by_key(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, tokens=1000, **options)


@pytest.mark.parametrize(
    ("name", "options", "choices", "message"),
    [
        (
            "grpo_lambda",
            {},
            {"name": "dapo"},
            r"^algorithm\.dynamic_sampling: .*set .*: false",
        ),
        ("short_rl", {}, {"dynamic_sampling": True}, r"^algorithm\.dynamic_sampling: "),
        ("autothink", {"stage": 3}, {"dynamic_sampling": True}, r"^algorithm\.dynamic_sampling: "),
        ("twyn", {}, {"dynamic_sampling": True}, r"^algorithm\.dynamic_sampling: "),
        (
            "gdpo",
            {},
            {"name": "dapo"},
            r"^algorithm\.dynamic_sampling: .*\nalgorithm\.truncated: soft",
        ),
        (
            "gfpo",
            {},
            {"name": "dapo"},
            r"^algorithm\.truncated: soft .*set algorithm\.truncated: wrong",
        ),
        (
            "qglas",
            {},
            {"baseline": "mean"},
            r"^algorithm\.baseline: .*gives credits of its own.*leave it out",
        ),
        (
            "twyn",
            {},
            {"normalize": "batch"},
            r"^algorithm\.normalize: batch .*it has no effect; leave it out",
        ),
        (
            "gdpo",
            {},
            {"normalize": "tokens"},
            r"^algorithm\.normalize: tokens .*set method\.over: nothing",
        ),
        (
            "overlong",
            {},
            {"name": "dapo"},
            r"^algorithm\.truncated: soft .*overlong does so already",
        ),
        (
            "stop_properly",
            {},
            {"truncated": "soft"},
            r"^algorithm\.truncated: soft .*stop_properly does so already",
        ),
        (
            "anytime",
            {},
            {"truncated": "masked"},
            r"^algorithm\.truncated: masked leaves out thoughts .* set .*: wrong",
        ),
        (
            "stop_properly",
            {},
            {"truncated": "masked"},
            r"^algorithm\.truncated: masked .*is to teach by them",
        ),
        (
            "thinkless",
            {},
            {},
            r"^algorithm\.aggregate: sequence, and .* thinkless .*; set algorithm\.aggregate: token$",
        ),
        ("thinkless", {}, {"aggregate": "constant"}, r"^algorithm\.aggregate: constant, and"),
        (
            "drpo",
            {},
            {"name": "cispo"},
            r"^algorithm\.aggregate: token, and .* drpo .*set algorithm\.aggregate: sequence$",
        ),
        (
            "drpo",
            {},
            {"name": "filtered_sft"},
            r"^algorithm\.name: filtered_sft filters .* drpo .*take likelihood$",
        ),
        ("drpo", {}, {"name": "dr_grpo"}, r"^algorithm\.aggregate: constant, and"),
    ],
)
def test_choices_of_an_algorithm_that_undo_a_method_are_refused(
    name: str, options: dict[str, Any], choices: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        methods.check_together(name, build(name, **options), algorithm(**choices))


@pytest.mark.parametrize("name", ["s_grpo", "mrt"])
def test_one_response_of_a_prompt_goes_with_an_algorithm_without_baseline(name: str) -> None:
    rollout = RolloutConfig(samples=1)
    for choices in ({"name": "grpo", "normalize": "none"}, {"name": "rloo"}, {"name": "dr_grpo"}):
        with pytest.raises(
            ConfigError, match=r"^rollout\.samples: 1 .*, or algorithm\.baseline: none$"
        ):
            algorithms.build(AlgorithmConfig.model_validate(choices), rollout)
        one = algorithms.build(
            AlgorithmConfig.model_validate(choices | {"baseline": "none"}), rollout
        )
        methods.check_together(name, build(name, samples=1), one)


def algorithm(**choices: Any) -> algorithms.Algorithm:
    return algorithms.build(AlgorithmConfig.model_validate(choices), RolloutConfig())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_goes_with_every_algorithm_that_leaves_prompts_and_penalties_to_it(
    name: str,
) -> None:
    """As their sources have them: nobody need set what is not refused by name."""
    mean = METHODS[name].needs.aggregate
    for other in algorithms.ALGORITHMS:
        if mean is not None and mean != "sequence" and other == "gspo":
            continue  # which knows one mean alone
        if (
            algorithms.ALGORITHMS[other].filters
            and METHODS[name].credits is not methods.Method.credits
        ):
            continue  # credits of its own pass no filter
        choices = {"dapo": {"dynamic_sampling": False, "truncated": "wrong"}}.get(other, {})
        options = {"over": "nothing"} if name == "gdpo" else {}
        asked_for = {} if mean is None else {"aggregate": mean}
        methods.check_together(
            name, build(name, **options), algorithm(name=other, **choices, **asked_for)
        )
    if mean in (None, "sequence"):
        methods.check_together(name, build(name), algorithm())
    if not build(name).equal_rewards_teach and name not in OWN:
        methods.check_together(name, build(name), algorithm(name="dapo"))


OWN = {
    "gfpo",
    "qglas",
    "overlong",
    "stop_properly",
    "drpo",
    "thinkless",
    "experimental.l2t",
    "infty_think",
}
"""Methods that DAPO's soft penalty does not go with."""


def test_prompts_are_replaced_where_equal_rewards_teach_nothing() -> None:
    """The property against the credits: of groups that are all right, of different lengths."""
    silent = 0
    for name in sorted(METHODS):
        method = build(name, **({"stage": 3, "decay": 0.5} if name == "autothink" else {}))
        (group,) = (methods.reward(method, asked([1] * 4, L), KNOWN),)
        if np.ptp(group.rewards) == 0 and not method.equal_rewards_teach:
            assert np.ptp(trained_on(method, [1] * 4, L)) == 0, name
            silent += 1
    assert silent == 23, "of these methods; a new one whose equal rewards teach nothing is one more"


def test_what_a_method_leaves_out_of_the_loss_stays_out() -> None:
    class Masking(methods.Plain):
        def rule(self, group: Outcomes) -> np.ndarray:
            return group.right.astype(np.float64)

        def credits(self, groups: Sequence[Rewarded], known: Known) -> list[Credit]:
            return [
                Credit(group.rewards, masked=np.array([True, False, False])) for group in groups
            ]

    (group,) = rewarded(Masking(), [([1, 0, 1], [5, 6, 7])], finish=["stop", "stop", "length"])
    for choices, masked in (
        ({}, [True, False, False]),
        ({"truncated": "masked"}, [True, False, True]),
    ):
        (made,) = methods.credit(Masking(), algorithm(**choices), [group], KNOWN)
        assert made.credit.masked is not None
        assert made.credit.masked.tolist() == masked


def test_methods_that_need_more_are_no_plain_functions() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^hapo: its rewards need more than .* plain methods are asrr, cosine, da_dler",
    ):
        methods.rewards("hapo", C, L)


def test_the_function_takes_every_option_and_refuses_what_a_run_does() -> None:
    taken = set(inspect.signature(methods.rewards).parameters)
    for name, kind in METHODS.items():
        assert not issubclass(kind, methods.Plain) or not taken & set(kind.model_fields), name
    cut = methods.rewards("stop_properly", C, L, truncated=[0, 0, 1, 0], cut_off=-0.5)
    assert cut.tolist() == [1.0, 0.0, -0.5, 1.0]
    with pytest.raises(
        ConfigError, match=r"^method\.cache: 2000 tokens are more than the limit, 1000"
    ):
        methods.rewards("overlong", C, L, max_tokens=1000, cache=2000)
    with pytest.raises(
        ConfigError, match=r"^method\.target: 4096 tokens, and no response has more"
    ):
        methods.rewards("laser", C, L, max_new_tokens=1000)


GROUP_FREE = {
    "overlong", "thinkprune", "cosine", "laser", "dler", "stop_properly", "hapo", "leash", "a_dlp",
    "acoer", "l1_exact",
    "l1_max", "elastic", "mrt", "s_grpo",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_single_response_is_enough_where_nothing_is_compared(name: str) -> None:
    """And there a response earns what it would without the others."""
    if name not in GROUP_FREE:
        with pytest.raises(
            ConfigError, match=r"^rollout\.samples: 1 response\(s\) per prompt, and .* compares"
        ):
            build(name, samples=1)
        return
    method = build(name, samples=1)
    together = trained_on(method, C, L)
    assert [trained_on(method, [c], [n])[0] for c, n in zip(C, L, strict=True)] == together.tolist()


def test_the_papers_numbers_under_its_own_algorithm() -> None:
    got = rloo(methods.rewards("efr", C, L, alpha=0.2))
    assert got == close(outputs("efr")["paper_advantage_rloo"])
    assert isinstance(Outcomes.of(graded(C, L), 10).limit, int)
