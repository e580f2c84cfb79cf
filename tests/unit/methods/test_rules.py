"""Every built-in method against worked numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_efr import methods
from megatron_efr.config import ConfigError
from megatron_efr.methods import Monitor, Sampled
from megatron_efr.methods.monitored import LaserD, repetitive
from megatron_efr.methods.relative import GDPO, qglas_advantages
from tests.groups import KNOWN, graded
from tests.judged import VECTORS, C, L, build, close, outputs, rewarded, trained_on

pytestmark = pytest.mark.alike


# -- worked numbers
# --------------------------------------------------------------------------------------------------


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
            {"max_tokens": 1000, "right_short": 1, "right_long": 0.5, "wrong_short": -1,
                "wrong_long": -0.5,
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
    assert methods.rewards("efr", [0, 1, 0, 0], L, alpha=0.2) == close(
        outputs("efr")["one_correct"]
    )
    assert methods.rewards("efr", [1, 1, 1, 1], L, alpha=0.2) == close(
        outputs("efr")["all_correct"]
    )
    assert methods.rewards("shorterbetter", [0] * 4, L) == close(
        outputs("shorterbetter")["none_correct_rewards"]
    )
    assert methods.rewards("kimi", C, [7] * 4) == close(np.add(C, outputs("kimi")["equal_lengths"]))
    assert methods.rewards("lapo", [0, 1, 0, 0], L) == close(
        outputs("lapo_stage1")["one_correct_rewards"]
    )
    assert methods.rewards("cosine", [1, 1], [984, 983], max_tokens=1000) == close(
        outputs("cosine")["at_984_and_983"]
    )
    cut = methods.rewards("stop_properly", C, L, truncated=[False, False, True, False])
    assert cut == close(outputs("stop_properly")["rewards"])
    overlong = {"max_tokens": 1000, "cache": 400}
    longer = [500, 700, 1000, 1100]
    assert methods.rewards("overlong", [1] * 4, longer, **overlong) - 1 == close(
        outputs("overlong")["second_capped"]
    )
    assert methods.rewards("asrr", [1] * 4, L) == close(outputs("asrr")["tau1_all_correct_rewards"])
    uncapped = methods.rewards("overlong", [1] * 4, longer, floor=False, **overlong)
    assert uncapped - 1 == close(outputs("overlong")["second_verl_nemo_uncapped"])


def test_limits_are_the_rollouts_where_they_are_left_out() -> None:
    """Of 1,000 tokens: a fifth of them is DAPO's 4,096 of 20,480."""
    got = methods.rewards("overlong", C, L, max_new_tokens=1000)
    assert got.tolist() == pytest.approx([1.0, -1.5, 1.0, 1.0])
    assert np.array_equal(
        got, build("overlong", tokens=1000).rewards(graded(C, L), KNOWN._replace(limit=1000))
    )
    cosine = methods.rewards("cosine", C, L, max_tokens=1000)
    assert np.array_equal(methods.rewards("cosine", C, L, max_new_tokens=1000), cosine)
    assert methods.rewards("thinkprune", C, L, max_new_tokens=1000).tolist() == [1, 0, 1, 1]
    for name in ("overlong", "cosine", "thinkprune", "dler"):
        with pytest.raises(ConfigError, match="not set, and no max_new_tokens is given"):
            methods.rewards(name, C, L)


def monitored(**lengths: list[int]) -> dict[str, Sampled]:
    """A monitor set whose prompts are solved as their bands say, with right responses of these
    lengths.
    """
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
    # the released code takes the wrong ones' lengths too, which are a half of those of medium, and
    # most of low
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
    known = KNOWN._replace(
        monitor=monitored(**{band: [target] for band, target in targets.items()})
    )
    assert trained_on(method, C, L, known) == close(expected)
    repeating = method.rewards(graded(C, L), known)  # one token, 900 times
    assert repeating == close(VECTORS["laser_d"]["outputs"]["rewards"])
    assert trained_on(method, C, L) == close([1.5, -0.5, 1.5, 1.5]), (
        "no target: each right answer is within it"
    )
    cut = trained_on(
        method, [1, 0, 0, 0], [300, 900, 500, 120], known, finish=["length", "stop", "stop", "stop"]
    )
    assert cut == close([-1.0, expected[1], -0.5, -0.5]), "none is right: the target is that of low"
    low = KNOWN._replace(monitor=monitored(low=[200]))
    cut = trained_on(
        method, [1, 0, 0, 0], [300, 900, 500, 120], low, finish=["length", "stop", "stop", "stop"]
    )
    assert cut == close([-0.5, 0, 0, -0.5] if name == "laser_de" else [-1.0, -0.5, -0.5, -0.5])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (range(300), False),
        # four tokens twice: in a long response thrice is needed
        ([*range(300), *range(296, 300)], False),
        ([*range(300), *range(292, 300)], True),  # eight tokens twice
        ([*range(300), 296, 297, 298, 299, 999, 296, 297, 298, 299], True),
        # thrice, but far apart
        ([*range(4), *range(100, 220), *range(4), *range(220, 340), *range(4)], False),
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
    all_of_them = rewarded(
        build("grpo_lambda", share=1.0), [(group["c"], group["l"]) for group in groups.values()]
    )
    for group, given in zip(all_of_them, groups.values(), strict=True):
        assert np.array_equal(
            group.rewards, methods.rewards("efr", given["c"], given["l"], alpha=0.2)
        )


def test_worked_advantages_of_a_groups_own() -> None:
    assert trained_on(build("twyn"), C, L) == close(outputs("twyn")["advantage"])
    lengths = VECTORS["gfpo"]["inputs"]["l"]
    gfpo = outputs("gfpo")
    assert trained_on(build("gfpo", keep=3), C, lengths) == close(gfpo["advantage_shortest"])
    by_reward = build("gfpo", keep=3, by="reward_per_token")
    assert trained_on(by_reward, C, lengths) == close(gfpo["advantage_reward_per_token"])
    assert trained_on(build("gfpo", keep=2), C, L) == close(gfpo["original_l_k2_advantage"])
    gdpo = outputs("gdpo")
    assert trained_on(build("gdpo", limit=40_000 - 1, over="nothing", short=0.0), C, L) == close(
        [0.5, -1.5, 0.5, 0.5]
    )
    for over, key in (
        ("nothing", "summed_group_z"),
        ("tokens", "verl_token_whitened"),
        ("responses", "nemo_trl_batch_z_single_group"),
    ):
        # TRL adds 1e-4 to the deviation
        assert trained_on(build("gdpo", limit=400, over=over), C, L) == pytest.approx(
            np.array(gdpo[key]), abs=2e-4
        )
    qglas = VECTORS["qglas"]
    assert trained_on(build("qglas"), C, L) == close(qglas["outputs"]["binary_quality"])
    quality = np.array(qglas["inputs"]["quality"])
    assert qglas_advantages(quality, np.array(L, float), 0.3, 0.6, 0.5) == close(
        qglas["outputs"]["dense_quality"]
    )


def test_brevity_is_normalised_over_the_whole_iteration() -> None:
    groups = [(C, L), ([0, 1, 0, 0], [400, 200, 400, 401])]
    method = GDPO(limit=400)
    credits = method.credits(rewarded(method, groups), KNOWN)
    flat = np.concatenate([credit.advantage for credit in credits])
    assert [len(credit.advantage) for credit in credits] == [4, 4]
    assert (flat.mean(), flat.std(ddof=1)) == (
        pytest.approx(0, abs=1e-12),
        pytest.approx(1, abs=1e-4),
    )
