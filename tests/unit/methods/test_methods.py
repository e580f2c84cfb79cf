"""Rewards and advantages against hand-computed groups and an independent fp64 reference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_efr import algorithms, methods
from megatron_efr.algorithms import rloo
from megatron_efr.config import (
    AlgorithmConfig,
    ConfigError,
    MethodConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_efr.config.file import validate
from megatron_efr.methods import efr_rewards
from megatron_efr.types import Prompt, Rewarded
from tests.groups import KNOWN, graded


def build(name: str, samples: int = 8, limit: int = 40_000, **options: Any) -> methods.Method:
    config = MethodConfig.model_validate({"name": name, **options})
    return methods.build(
        config, RolloutConfig(samples=samples, max_new_tokens=limit), AlgorithmConfig()
    )


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def test_reward_of_a_mixed_group_by_hand() -> None:
    # correct lengths 10 and 30: mean 20, population std 10, so z = -1 and +1
    rewards = efr_rewards(np.array([1, 0, 1]), np.array([10, 99, 30]), 0.4)
    assert rewards.tolist() == pytest.approx(
        [1 - 0.4 * sigmoid(-1), 0.0, 1 - 0.4 * sigmoid(1)], abs=1e-7
    )


def test_none_one_and_all_correct() -> None:
    assert efr_rewards(np.array([0, 0]), np.array([5, 9]), 0.4).tolist() == [0.0, 0.0]
    assert efr_rewards(np.array([0, 1]), np.array([5, 9]), 0.4).tolist() == [0.0, 1 - 0.2]
    assert efr_rewards(np.array([1, 1, 1]), np.array([7, 7, 7]), 0.4).tolist() == pytest.approx(
        [0.8] * 3, abs=1e-12
    )
    # lengths 1, 2, 3: mean 2, std sqrt(2/3)
    z = 1 / math.sqrt(2 / 3)
    assert efr_rewards(np.array([1, 1, 1]), np.array([1, 2, 3]), 0.2).tolist() == pytest.approx(
        [1 - 0.2 * sigmoid(-z), 0.9, 1 - 0.2 * sigmoid(z)], abs=1e-7
    )


def test_alpha_zero_is_accuracy() -> None:
    correct = np.array([[1, 0, 1], [0, 0, 0]])
    assert np.array_equal(
        efr_rewards(correct, np.array([[3, 4, 5], [6, 7, 8]]), 0.0), correct.astype(float)
    )


def test_truncated_response_is_wrong_and_enters_no_statistic() -> None:
    method = build("efr", samples=3, alpha=0.4)
    cut_off = graded([True, True, True], [10, 30, 1000], ["stop", "stop", "length"])
    assert method.rewards(cut_off, KNOWN).tolist() == pytest.approx(
        [1 - 0.4 * sigmoid(-1), 1 - 0.4 * sigmoid(1), 0.0], abs=1e-7
    )


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 40000)), min_size=2, max_size=16),
    st.floats(0, 0.99),
)
@settings(max_examples=200, deadline=None)
def test_reward_properties(rows: list[tuple[bool, int]], alpha: float) -> None:
    correct, lengths = np.array([c for c, _ in rows]), np.array([n for _, n in rows])
    rewards = efr_rewards(correct, lengths, alpha)
    assert np.all(rewards[~correct] == 0)
    assert np.all((rewards[correct] >= 1 - alpha) & (rewards[correct] <= 1))
    by_length = rewards[correct][np.argsort(lengths[correct], kind="stable")]
    assert np.all(np.diff(by_length) <= 1e-12), "a longer correct response never earns more"
    # an independent reading of the formula, with the standard library's statistics
    import statistics

    right = [n for c, n in rows if c]
    if right:
        mean, std = statistics.fmean(right), statistics.pstdev(right)
        expected = [
            c * (1 - alpha * sigmoid(max(-700.0, (n - mean) / (std + 1e-7)))) if c else 0.0
            for c, n in rows
        ]
        assert rewards.tolist() == pytest.approx(expected, abs=1e-6)


def test_tensors_and_batches_agree_with_arrays() -> None:
    rng = np.random.default_rng(0)
    correct, lengths = rng.random((5, 8)) < 0.5, rng.integers(1, 500, (5, 8))
    rows = np.stack([efr_rewards(c, n, 0.3) for c, n in zip(correct, lengths, strict=True)])
    assert np.array_equal(efr_rewards(correct, lengths, 0.3), rows)
    tensor = efr_rewards(torch.from_numpy(correct), torch.from_numpy(lengths), 0.3)
    assert isinstance(tensor, torch.Tensor)
    assert np.array_equal(tensor.numpy(), rows)


@pytest.mark.parametrize("alpha", [-0.1, 1.0, float("nan")])
def test_alpha_outside_its_range(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must lie in"):
        efr_rewards(np.array([1, 1]), np.array([1, 2]), alpha)
    with pytest.raises(ConfigError, match=r"method\.alpha"):
        build("efr", samples=8, alpha=alpha)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        efr_rewards(np.ones(3), np.ones(4), 0.1)


def test_rloo_by_definition() -> None:
    rewards = np.random.default_rng(1).normal(size=(6, 5))
    expected = [[row[i] - (row.sum() - row[i]) / 4 for i in range(5)] for row in rewards]
    assert np.allclose(rloo(rewards), expected, atol=1e-14)
    assert np.allclose(rloo(rewards).sum(-1), 0, atol=1e-13)


def test_rloo_needs_company() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        rloo(np.array([1.0]))
    with pytest.raises(ConfigError, match=r"rollout\.samples: 1 response"):
        build("efr", samples=1, alpha=0.1)


def test_unknown_method_and_option_are_named() -> None:
    with pytest.raises(ConfigError, match=r"no method 'grpo'; there are .*efr"):
        build("grpo", samples=8)
    with pytest.raises(ConfigError, match=r"method\.alhpa: unknown key; did you mean alpha"):
        build("efr", samples=8, alpha=0.1, alhpa=0.1)


# -- min_std: this project's option of the paper's reward
# --------------------------------------------------------------


def test_a_spread_of_a_few_tokens_counts_less_where_min_std_is_set() -> None:
    narrow, wide, right = np.array([1000, 1001]), np.array([1000, 30000]), np.array([1, 1])
    paper = methods.rewards("efr", right, narrow, alpha=0.4)
    assert paper == pytest.approx(methods.rewards("efr", right, wide, alpha=0.4), abs=1e-6)
    # mean 1000.5: z is 0.5 tokens of 100
    least = methods.rewards("efr", right, narrow, alpha=0.4, min_std=100)
    assert least.tolist() == pytest.approx(
        [1 - 0.4 * sigmoid(-0.005), 1 - 0.4 * sigmoid(0.005)], abs=1e-9
    )
    assert np.array_equal(
        methods.rewards("efr", right, wide, alpha=0.4, min_std=100), efr_rewards(right, wide, 0.4)
    )
    assert np.array_equal(efr_rewards(right, narrow, 0.4, 0.0), efr_rewards(right, narrow, 0.4))
    with pytest.raises(ValueError, match="min_std must be at least 0"):
        efr_rewards(right, narrow, 0.4, -1.0)


# -- the plain function
# ------------------------------------------------------------------------------------------------


def test_the_function_gives_the_methods_own_rewards() -> None:
    group = graded([True, False, True], [10, 99, 30])
    got = methods.rewards("efr", [1, 0, 1], [10, 99, 30], alpha=0.4)
    assert np.array_equal(got, build("efr", alpha=0.4).rewards(group, KNOWN))
    cut = methods.rewards("efr", [True, True], [10, 30], truncated=[False, True], alpha=0.4)
    assert cut.tolist() == [0.8, 0.0]


@pytest.mark.parametrize(
    ("name", "correct", "lengths", "options", "error", "message"),
    [
        ("efr", [1, 1], [5, 6], {}, ConfigError, r"^efr\.alpha: required, and not set"),
        (
            "efr",
            [1, 1],
            [5, 6],
            {"alpah": 0.1},
            ConfigError,
            r"\nefr\.alpah: unknown key; did you mean alpha",
        ),
        ("efr", [1, 1], [5, 6], {"alpha": 2}, ConfigError, r"^efr\.alpha: .*less than 1 \(got 2\)"),
        ("eff", [1, 1], [5, 6], {}, ConfigError, r"no method 'eff'; there are .*efr"),
        (
            "efr",
            [1, 1, 0],
            [5, 6],
            {"alpha": 0.1},
            ValueError,
            r"^correct: of shape \[3\], and lengths has \[2\]",
        ),
        (
            "efr",
            [0.5, 1],
            [5, 6],
            {"alpha": 0.1},
            ValueError,
            r"^correct: \[0\.5, 1\.0\]; give true or false",
        ),
        (
            "efr",
            [1, 1],
            [5, 0],
            {"alpha": 0.1},
            ValueError,
            r"^lengths: \[5, 0\]; numbers of tokens are integers",
        ),
        (
            "efr",
            [1, 1],
            [5, 6.5],
            {"alpha": 0.1},
            ValueError,
            r"^lengths: \[5\.0, 6\.5\]; numbers of tokens",
        ),
        (
            "efr",
            [1, 1],
            ["a", "b"],
            {"alpha": 0.1},
            ValueError,
            r"^lengths: of type <U1; give integers",
        ),
        (
            "efr",
            [[1]],
            [[5]],
            {"alpha": 0.1},
            ValueError,
            r"^lengths: of shape \[1, 1\]; give one number",
        ),
        ("efr", [], [], {"alpha": 0.1}, ValueError, r"^lengths: of shape \[0\]"),
        (
            "efr",
            [1],
            [5],
            {"alpha": 0.1, "max_new_tokens": 4},
            ValueError,
            r"^lengths: 5 tokens, and max_new_tokens",
        ),
    ],
)
def test_bad_input_of_the_function_is_named(
    name: str,
    correct: Any,
    lengths: Any,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        methods.rewards(name, correct, lengths, **options)


# -- what a run can give, and what is registered
# -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (
            methods.Needs(samples=9),
            r"^rollout\.samples: 8 response\(s\) per prompt.*needs at least 9",
        ),
        (
            methods.Needs(algorithms=frozenset({"grpo"})),
            r"^algorithm\.name: rloo, and method asking works with grpo",
        ),
    ],
)
def test_what_a_run_cannot_give_is_refused(
    needs: methods.Needs, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asking(methods.EFR):
        pass

    Asking.needs = needs
    monkeypatch.setitem(methods.METHODS, "asking", Asking)
    with pytest.raises(ConfigError, match=message):
        build("asking", alpha=0.1)


def test_a_method_is_frozen_and_its_configuration_runs_again() -> None:
    tree = {
        "name": "a",
        "model": {"path": "m"},
        "data": {"datasets": [{"path": "d"}]},
        "optimizer": {"lr": 1e-6},
    }
    config = validate(TrainConfig, tree | {"method": {"name": "efr", "alpha": 0.2}}, "test.yaml")
    made = methods.build(config.method, config.rollout, config.algorithm)
    with pytest.raises(Exception, match="frozen"):
        made.alpha = 0.3  # type: ignore[attr-defined]
    written = methods.resolved(config, made)
    assert written.method.model_dump() == {"name": "efr", "alpha": 0.2, "min_std": 0.0}
    assert methods.build(written.method, written.rollout, written.algorithm) == made
    assert TrainConfig.model_fields["method"].get_default(call_default_factory=True).name == "efr"


def test_third_parties_are_found_by_their_entry_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method and an algorithm of a package that is not ours, from the configuration to the
    credits.
    """
    install_brief(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    tree = {
        "name": "a",
        "model": {"path": "m"},
        "data": {"datasets": [{"path": "d"}]},
        "optimizer": {"lr": 1e-6},
    }
    tree |= {
        "method": {"name": "brief", "price": 0.01},
        "algorithm": {"name": "halved", "share": 0.25},
    }
    config = validate(TrainConfig, tree, "test.yaml")
    method = methods.build(config.method, config.rollout, config.algorithm)
    algorithm = algorithms.build(config.algorithm, config.rollout)
    group = graded([True, False, True], [10, 30, 50])
    rewarded = Rewarded(group, method.rewards(group, KNOWN))
    assert rewarded.rewards == pytest.approx([0.9, -0.3, 0.5])
    (credited,) = methods.credit(method, algorithm, [rewarded], KNOWN)
    assert credited.credit.advantage == pytest.approx(0.25 * rloo(rewarded.rewards))
    assert method.learn({"groups": 2}, [rewarded], KNOWN) == {"groups": 3}
    assert methods.rewards("brief", [1, 0, 1], [10, 30, 50]) == pytest.approx([0.99, -0.03, 0.95])
    with pytest.raises(ConfigError, match=r"method\.prise: unknown key; did you mean price"):
        build("brief", prise=0.1)
    with pytest.raises(ConfigError, match=r"no method 'other'; there are .*brief"):
        build("other")


def test_a_third_partys_package_that_does_not_load_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_brief(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    missing = r"^method\.name: gone, which is registered as brief_package:Gone, cannot be loaded: AttributeError"
    with pytest.raises(ConfigError, match=missing):
        build("gone")
    with pytest.raises(
        ConfigError,
        match=r"^method\.name: halved, .* is no subclass of megatron_efr\.methods\.Method",
    ):
        build("halved")
    with pytest.raises(
        ConfigError, match=r"^algorithm\.name: brief, .* is no subclass of .*algorithms\.Algorithm"
    ):
        algorithms.build(AlgorithmConfig(name="brief"), RolloutConfig())


def install_brief(folder: Path) -> None:
    """Lay a package with a method and an algorithm into `folder`, as pip would."""
    (folder / "brief_package.py").write_text(
        "from megatron_efr.algorithms import Algorithm\n"
        "from megatron_efr.methods import Plain\n"
        "class Brief(Plain):\n"
        "    price: float = 0.001\n"
        "    def rule(self, group):\n"
        "        return group.right - self.price * group.lengths\n"
        "    def learn(self, state, groups, known):\n"
        "        return {'groups': state.get('groups', 0) + len(groups)}\n"
        "class Halved(Algorithm):\n"
        "    name: str = 'halved'\n"
        "    share: float = 0.5\n"
        "    def credits(self, rewards, lengths, limit):\n"
        "        return [self.share * each for each in super().credits(rewards, lengths, limit)]\n"
    )
    registration = folder / "brief_package-1.0.dist-info"
    registration.mkdir()
    (registration / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: brief_package\nVersion: 1.0\n"
    )
    (registration / "entry_points.txt").write_text(
        "[megatron_efr.methods]\nbrief = brief_package:Brief\ngone = brief_package:Gone\n"
        "halved = brief_package:Halved\n"
        "[megatron_efr.algorithms]\nhalved = brief_package:Halved\nbrief = brief_package:Brief\n"
    )


# -- what is known and remembered
# --------------------------------------------------------------------------------------


class Counting(methods.Plain):
    """Counts groups, and rewards by what it counted."""

    def rule(self, group: methods.Outcomes) -> np.ndarray:
        return group.right.astype(np.float64)

    def learn(self, state: Any, groups: Any, known: methods.Known) -> dict[str, Any]:
        return {
            "groups": [*state.get("groups", []), len(groups)],
            "began_with": known.state.get("groups", []),
        }


def prompt(name: str) -> Prompt:
    return Prompt(name, (1,), "q", "1")


def rewarded(right: list[bool], lengths: list[int], name: str, finish: Any = None) -> Rewarded:
    group = graded(right, lengths, finish, prompt=prompt(name))
    return Rewarded(group, group.correct.astype(np.float64))


def test_the_history_of_a_prompt_by_hand() -> None:
    knowledge = methods.Knowledge(Counting(), limit=100)
    knowledge.begin(1)
    cut: Any = ["stop", "stop", "length"]
    knowledge.learn(
        1, [rewarded([True, False, True], [40, 10, 100], "a", cut), rewarded([False], [7], "b")]
    )
    first = knowledge.begin(2).history
    assert dict(first) == {
        "a": methods.Seen(1, 3, 1, 40, 40, 1),
        "b": methods.Seen(1, 1, 0, 0, None, 1),
    }
    assert (first["a"].solved, first["a"].mean_right, first["b"].mean_right) == (1 / 3, 40.0, None)
    # the same prompt twice in one iteration
    knowledge.learn(
        2, [rewarded([True, True], [20, 60], "a"), rewarded([True, False], [30, 90], "a")]
    )
    assert knowledge.begin(3).history["a"] == methods.Seen(3, 7, 4, 150, 20, 2)
    assert first["a"].visits == 1, "what an iteration began with stays as it was"


def test_iterations_see_what_was_known_when_they_began() -> None:
    knowledge = methods.Knowledge(Counting(), limit=100)
    knowledge.begin(1)
    knowledge.begin(2)  # asynchronous: 2 begins before 1 is learnt from
    knowledge.learn(1, [rewarded([True], [5], "a")])
    assert (knowledge.of(2).step, knowledge.of(2).limit, dict(knowledge.of(2).state)) == (
        2,
        100,
        {},
    )
    assert knowledge.begin(3).state == {"groups": [1], "began_with": []}


def test_what_is_known_survives_a_restart_bit_for_bit() -> None:
    def iterations(knowledge: methods.Knowledge, first: int, last: int) -> None:
        for step in range(first, last + 1):
            knowledge.begin(step)
            knowledge.learn(
                step, [rewarded([step % 2 > 0, True], [7 * step, 31 + step], f"p{step % 3}")]
            )

    whole = methods.Knowledge(Counting(), limit=100)
    iterations(whole, 1, 6)
    cut = methods.Knowledge(Counting(), limit=100)
    iterations(cut, 1, 4)
    cut.begin(5)  # killed within
    stored = json.dumps(cut.state_dict())
    resumed = methods.Knowledge(Counting(), limit=100)
    resumed.load_state_dict(json.loads(stored))
    iterations(resumed, 5, 6)
    assert json.dumps(resumed.state_dict()) == json.dumps(whole.state_dict())
    assert resumed.begin(7) == whole.begin(7)
    resumed.load_state_dict({})  # a checkpoint of before there was a history
    assert resumed.begin(1) == methods.Known(1, 100, {}, {})
