"""Choice of an algorithm and its options: names, defaults, refusals, masks, third parties."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_efr import algorithms, methods
from megatron_efr.algorithms import Objective
from megatron_efr.config import AlgorithmConfig, ConfigError, RolloutConfig, TrainConfig
from megatron_efr.config.file import dump, validate
from megatron_efr.policy.packing import row_weights, samples
from megatron_efr.types import Credit, Rewarded
from tests.groups import KNOWN
from tests.unit.algorithms.test_algorithms import (
    CORRECT,
    LENGTHS,
    LIMIT,
    SAMPLES,
    build,
    drawn,
    objective,
)


@pytest.mark.parametrize("name", sorted(algorithms.ALGORITHMS))
def test_every_algorithm_is_found_by_name_and_its_choices_run_again(name: str) -> None:
    made = build(name)
    assert made.name == name
    assert made.__doc__
    tree = {
        "name": "a",
        "model": {"path": "m"},
        "data": {"datasets": [{"path": "d"}]},
        "optimizer": {"lr": 1e-6},
    }
    config = validate(TrainConfig, tree, "test.yaml")
    written = algorithms.resolved(config, made)
    assert f"name: {name}" in dump(written)
    assert algorithms.build(written.algorithm, written.rollout) == made
    with pytest.raises(Exception, match="frozen"):
        made.baseline = "none"


def test_the_default_is_the_papers() -> None:
    made = objective(algorithms.build(AlgorithmConfig(), RolloutConfig()))
    assert made == Objective(kl="reward", beta=1e-3)
    assert objective(build("rloo", beta=0.0)) == Objective()
    assert not objective(build("rloo", beta=0.0)).needs_reference


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("grpoo", {}, r"algorithm\.name: no algorithm 'grpoo'; there are cispo, dapo, dr_grpo"),
        ("rloo", {"betta": 0.1}, r"algorithm\.betta: unknown key; did you mean beta"),
        ("rloo", {"clip_low": 1.5}, r"algorithm\.clip_low"),
        (
            "rloo",
            {"deviation": "sample"},
            r"algorithm\.deviation: 'sample' has no effect while algorithm\.normalize",
        ),
        (
            "grpo",
            {"divisor": 8},
            r"algorithm\.divisor: 8 has no effect while algorithm\.aggregate is sequence",
        ),
        (
            "grpo",
            {"kl": "none", "beta": 0.1},
            r"algorithm\.beta: 0\.1 has no effect while algorithm\.kl is none",
        ),
        (
            "grpo",
            {"importance": "mask", "importance_cap": 3.0},
            r"algorithm\.importance_cap: 3\.0 has no effect",
        ),
        ("grpo", {"overlong_tokens": 5}, r"algorithm\.overlong_tokens: 5 has no effect"),
        (
            "dapo",
            {"overlong_tokens": 5000},
            r"algorithm\.overlong_tokens: 5000 is more than a response may have",
        ),
        ("grpo", {"deviation": "others"}, r"algorithm\.baseline: mean does not leave it out"),
        (
            "reinforce_plus_plus",
            {"deviation": "others"},
            r"normalize: tokens looks at the whole batch",
        ),
        (
            "grpo",
            {"baseline": "none"},
            r"normalize: group divides by the spread of a prompt's rewards",
        ),
        (
            "cispo",
            {"dual_clip": 3.0},
            r"algorithm\.dual_clip: a ratio that only weighs has no minimum",
        ),
        (
            "filtered_sft",
            {"baseline": "mean"},
            r"algorithm\.baseline: filtered_sft tells apart what passes",
        ),
        (
            "filtered_sft_negatives",
            {"normalize": "batch"},
            r"algorithm\.normalize: filtered_sft_negatives tells apart",
        ),
        (
            "filtered_sft",
            {"truncated": "soft"},
            r"algorithm\.truncated: soft takes .*set algorithm\.truncated: wrong",
        ),
        ("filtered_sft", {"negative": 1.0}, r"algorithm\.negative: unknown key"),
        ("gspo", {"dual_clip": 3.0}, r"algorithm\.dual_clip: a sequence's ratio is clipped within"),
        (
            "gspo",
            {"aggregate": "token"},
            r"algorithm\.aggregate: token would weigh a sequence's one ratio by its",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, **options)


def test_algorithms_that_compare_need_company() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.samples: 1 response.*algorithm grpo compares"):
        build("grpo", samples=1)
    assert build("reinforce_plus_plus", samples=1).min_samples == 1


@pytest.mark.parametrize(
    ("old", "message"),
    [
        (
            {"clip": 0.1, "beta": 0.0},
            r"loss\.clip is algorithm\.clip_low and algorithm\.clip_high now; loss\.beta",
        ),
        (
            {"normalize": "batch"},
            r"loss\.normalize is algorithm\.normalize, and its value batch is called tokens now",
        ),
        ({"importance_cap": 3.0}, r"loss\.importance_cap is algorithm\.importance_cap now"),
        ({}, r"loss: this section is called algorithm now"),
    ],
)
def test_an_old_key_is_refused_with_its_new_name(old: dict[str, Any], message: str) -> None:
    tree = {
        "name": "a",
        "model": {"path": "m"},
        "data": {"datasets": [{"path": "d"}]},
        "optimizer": {"lr": 1e-6},
    }
    with pytest.raises(ConfigError, match=message):
        validate(TrainConfig, tree | {"loss": old}, "test.yaml")


def test_masked_responses_weigh_nothing_and_are_not_counted() -> None:
    groups = methods.credit(
        methods.Method(), build("grpo", truncated="masked"), drawn(0), KNOWN._replace(limit=40)
    )
    sizes = [s.size for s in samples(groups)]
    cut = [
        i for i, r in enumerate(r for group in groups for r in group.group.responses) if r.truncated
    ]
    assert cut
    assert [i for i, size in enumerate(sizes) if size.trained == 0] == cut
    kept = [i for i in range(len(sizes)) if i not in cut]
    for aggregate, divisor in (("sequence", None), ("token", None), ("constant", 40)):
        weights = row_weights(sizes, list(range(len(sizes))), aggregate, divisor)
        assert {weights[i] for i in cut} == {0.0}
        alone = row_weights(sizes, kept, aggregate, divisor)
        assert all(weights[i] == alone[i] for i in kept)
        assert row_weights(sizes, cut, aggregate, divisor) == dict.fromkeys(cut, 0.0)
    groups = methods.credit(methods.Method(), build("grpo"), drawn(0), KNOWN._replace(limit=40))
    assert not any(size.trained == 0 for size in (s.size for s in samples(groups)))


def test_a_filter_asks_on_which_side_of_a_bound_a_reward_is() -> None:
    """The paper's reward, 0.9 and 0.8 for right answers: both pass alike. Wrong ones are left out,
    or pushed away.
    """
    rewards, lengths = (
        [np.array([0.9, 0.0, 0.8]), np.array([0.0, 0.0, 0.0])],
        [np.array([5, 6, 7])] * 2,
    )
    alone, both = build("filtered_sft"), build("filtered_sft_negatives", negative=0.5)
    assert [each.tolist() for each in alone.credits(rewards, lengths, LIMIT)] == [
        [1, 0, 1],
        [0, 0, 0],
    ]
    assert [each.tolist() for each in both.credits(rewards, lengths, LIMIT)] == [
        [1, -0.5, 1],
        [-0.5, -0.5, -0.5],
    ]
    assert [alone.passes(each).tolist() for each in rewards] == [[True, False, True], [False] * 3]
    assert both.passes(rewards[1]).all()
    strict = build("filtered_sft", above=0.85)
    assert strict.passes(rewards[0]).tolist() == [True, False, False]
    assert alone.min_samples == both.min_samples == 1


def test_groups_without_a_signal_are_kept_unless_sampling_is_dynamic() -> None:
    same, unlike = np.array([0.9, 0.9, 0.9]), np.array([0.9, 0.9, 0.8])
    assert [build("dapo").keeps(rewards) for rewards in (same, unlike)] == [False, True]
    assert [build("grpo").keeps(rewards) for rewards in (same, unlike)] == [True, True]
    assert not build("grpo", dynamic_sampling=True).keeps(same)


def test_dynamic_sampling_keeps_what_a_filter_learns_from() -> None:
    filtered = build("filtered_sft", dynamic_sampling=True)
    kept = [filtered.keeps(np.array(each)) for each in ([1.0, 1.0], [0.0, -1.0], [0.0, 1.0])]
    assert kept == [True, False, True]  # all of a group that is right pass
    with pytest.raises(ConfigError, match=r"algorithm\.dynamic_sampling: every group teaches"):
        build("filtered_sft_negatives", dynamic_sampling=True)


def test_a_methods_own_advantages_come_before_the_algorithms() -> None:
    class Own(methods.Method):
        def credits(self, groups: Sequence[Rewarded], known: methods.Known) -> list[Credit]:
            return [Credit(np.full(len(group.rewards), 0.5)) for group in groups]

    groups = methods.credit(Own(), build("grpo"), drawn(0), KNOWN._replace(limit=40))
    assert all(np.array_equal(group.credit.advantage, [0.5] * SAMPLES) for group in groups)


def test_a_third_partys_algorithm_is_found_by_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "halved.py").write_text(
        "from megatron_efr.algorithms import Algorithm\n"
        "class Halved(Algorithm):\n"
        "    name: str = 'halved'\n"
        "    share: float = 0.5\n"
        "    def credits(self, rewards, lengths, limit):\n"
        "        return [self.share * each for each in super().credits(rewards, lengths, limit)]\n"
    )
    registration = tmp_path / "halved-1.0.dist-info"
    registration.mkdir()
    (registration / "METADATA").write_text("Metadata-Version: 2.1\nName: halved\nVersion: 1.0\n")
    (registration / "entry_points.txt").write_text(
        "[megatron_efr.algorithms]\nhalved = halved:Halved\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    made = build("halved", share=0.25)
    (got,) = made.credits([CORRECT], [LENGTHS], LIMIT)
    assert got == pytest.approx(0.25 * algorithms.rloo(CORRECT))
    with pytest.raises(ConfigError, match=r"algorithm\.shar: unknown key; did you mean share"):
        build("halved", shar=0.25)
