"""Algorithms against worked numbers: advantages, losses, KL, aggregation, importance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_efr import methods
from megatron_efr.algorithms import Objective
from megatron_efr.kernels import PolicyRows, token_terms
from megatron_efr.policy.logprob_check import fill_importance
from megatron_efr.policy.packing import pack, row_weights
from megatron_efr.samples import SequenceSize
from tests.groups import sample
from tests.unit.algorithms.test_algorithms import (
    CORRECT,
    CPU,
    LENGTHS,
    LIMIT,
    VECTORS,
    build,
    objective,
    token_advantages,
)


@pytest.mark.parametrize(
    ("vector", "key", "name", "options"),
    [
        ("rloo", "advantage", "rloo", {}),
        ("grpo", "verl_slime_sample_std_1e_6", "grpo", {}),
        ("grpo", "trl_sample_std_1e_4", "grpo", {"epsilon": 1e-4}),
        ("grpo", "dr_grpo_code_grpo_1e_8", "grpo", {"epsilon": 1e-8}),
        ("grpo", "paper_std_unspecified_population", "grpo", {"deviation": "population"}),
        ("grpo_nemo_leave_one_out", "advantage", "grpo",
            {"baseline": "others", "deviation": "others"}),
        ("dr_grpo", "advantage", "dr_grpo", {}),
        ("reinforce_plus_plus", "verl_token_whitened", "reinforce_plus_plus", {}),
        ("reinforce_plus_plus_baseline", "verl_token_whitened", "reinforce_plus_plus_baseline", {}),
        (
            "reinforce_plus_plus_baseline", "nemo_token_whitened_biased_clamp",
            "reinforce_plus_plus_baseline",
            {"deviation": "population", "guard": "floor"},
        ),
        ("opo", "advantage", "opo", {}),
    ],
)  # fmt: skip
def test_worked_advantages(vector: str, key: str, name: str, options: dict[str, Any]) -> None:
    (got,) = token_advantages(build(name, **options), [CORRECT], [LENGTHS])
    assert got == pytest.approx(VECTORS[vector]["outputs"][key], abs=1e-4)


def test_worked_advantages_of_the_papers_rewards() -> None:
    outputs = VECTORS["efr"]["outputs"]
    rewards = methods.efr_rewards(CORRECT, LENGTHS, 0.2)
    assert rewards == pytest.approx(outputs["rewards"], abs=1e-4)
    for options, key in (
        ({}, "paper_advantage_rloo"),
        ({"normalize": "tokens"}, "code_advantage_token_whitened"),
    ):
        (got,) = token_advantages(build("rloo", **options), [rewards], [LENGTHS])
        assert got == pytest.approx(outputs[key], abs=1e-4)


def test_worked_advantages_over_a_batch_of_groups() -> None:
    given, outputs = VECTORS["dler"]["inputs"]["groups"], VECTORS["dler"]["outputs"]
    lengths = [np.array(given[group]["l"], dtype=np.int64) for group in "AB"]
    rewards = [np.array(outputs["code_rewards_A"]), np.array(given["B"]["c"])]
    whitened = token_advantages(build("reinforce_plus_plus_baseline"), rewards, lengths)
    assert whitened[0] == pytest.approx(outputs["code_advantage_A"], abs=1e-4)
    assert whitened[1] == pytest.approx(outputs["code_advantage_B"], abs=1e-4)
    plain = build("dr_grpo", normalize="batch").credits(
        [np.array(outputs["paper_rewards_A"]), rewards[1]], lengths, 1
    )
    assert plain[0] == pytest.approx(outputs["paper_advantage_A_population"], abs=1e-4)
    assert plain[1] == pytest.approx(outputs["paper_advantage_B_population"], abs=1e-4)


def terms(
    made: Objective, advantage: float, ratio: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and its derivative of the worked sequence's tokens."""
    given = VECTORS["losses_one_sequence"]["inputs"]
    new, old = torch.tensor(given["logp_new"]), torch.tensor(given["logp_old"])
    rows = PolicyRows(
        old,
        torch.full((4,), advantage),
        torch.ones(4),
        torch.tensor(VECTORS["kl"]["inputs"]["ref"]),
    )
    figures, slope = token_terms(new, new - old if ratio is None else ratio, None, rows, made)
    return figures[0], slope


def test_worked_losses() -> None:
    outputs = VECTORS["losses_one_sequence"]["outputs"]
    for key, made, advantage in (
        ("ppo_clip_0_2_pos", objective(build("rloo")), 1.0),
        ("ppo_clip_0_2_neg_dual_3", objective(build("grpo", kl="none", dual_clip=3.0)), -1.0),
        ("ppo_neg_dual_2", objective(build("grpo", kl="none", dual_clip=2.0)), -1.0),
        ("dapo_clip_0_2_0_28_pos", objective(build("dapo")), 1.0),
        ("cispo_loss_pos_verl", objective(build("cispo", clip_low=0.2, clip_high=0.2)), 1.0),
    ):
        assert terms(made, advantage)[0].tolist() == pytest.approx(outputs[key], abs=1e-4), key
    # the weights are the derivative by the log-prob, sign turned
    for low, key in ((0.2, "cispo_weight_verl_slime_0_2_0_2"), (1.0, "cispo_weight_trl_cap_1_2")):
        slope = terms(objective(build("cispo", clip_low=low, clip_high=0.2)), 1.0)[1]
        assert (-slope).tolist() == pytest.approx(outputs[key], abs=1e-4)


def test_worked_sequence_ratio() -> None:
    given, outputs = (VECTORS["losses_one_sequence"][part] for part in ("inputs", "outputs"))
    mean = torch.tensor(given["logp_new"]).sub(torch.tensor(given["logp_old"])).mean().expand(4)
    assert float(mean[0].exp()) == pytest.approx(outputs["gspo_ratio"], abs=1e-4)
    made = objective(build("gspo"))
    assert (made.ratio, made.low, made.high) == ("sequence", 3e-4, 4e-4)
    for advantage, key in ((1.0, "gspo_loss_pos_3e4_4e4"), (-1.0, "gspo_loss_neg_3e4_4e4")):
        assert terms(made, advantage, mean)[0].tolist() == pytest.approx(
            [outputs[key]] * 4, abs=1e-4
        )


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_worked_kl(kl: str) -> None:
    given = VECTORS["kl"]
    rows = PolicyRows(
        *torch.tensor([given["inputs"]["logp"], [0.0] * 4, [1.0] * 4, given["inputs"]["ref"]])
    )
    made = objective(build("rloo", kl=kl, beta=1.0))
    figures, _ = token_terms(rows.old, torch.zeros(4), None, rows, made)
    assert figures[0].tolist() == pytest.approx(given["outputs"][kl], abs=1e-4)


def test_worked_aggregation() -> None:
    given, outputs = VECTORS["aggregation"]["inputs"], VECTORS["aggregation"]["outputs"]
    losses = given["token_losses"]
    sizes = [SequenceSize(3, len(each), len(each), 0) for each in losses]
    for name, options, key in (
        ("dapo", {}, "token_mean"),
        ("grpo", {}, "seq_mean_token_mean"),
        ("dr_grpo", {"divisor": 1}, "seq_mean_token_sum"),
        ("dr_grpo", {"divisor": 8}, "seq_mean_token_sum_over_constant"),
        ("dr_grpo", {}, "seq_mean_token_sum_over_constant"),  # the limit, which is 8 here
    ):
        made = objective(build(name, **options), limit=given["constant"])
        weights = row_weights(sizes, [0, 1], made.aggregate, made.divisor)
        assert sum(weights[i] * sum(losses[i]) for i in (0, 1)) == pytest.approx(
            outputs[key], abs=1e-4
        ), key
    longest = objective(build("dr_grpo", divisor="longest"))
    assert row_weights(sizes, [0, 1], longest.aggregate, longest.divisor) == {0: 1 / 8, 1: 1 / 8}


def test_worked_overlong_penalty() -> None:
    given, outputs = VECTORS["overlong"]["inputs"], VECTORS["overlong"]["outputs"]
    algorithm = build(
        "dapo", baseline="none", normalize="none", overlong_tokens=given["cache"], guard="std"
    )
    rewards = np.where(np.array(given["c"]) == 1, 1.0, -1.0)
    (got,) = algorithm.credits([rewards], [np.array(given["l"])], given["Lmax"])
    assert got == pytest.approx(outputs["rewards_plus_minus_1"])
    (got,) = algorithm.credits([np.zeros(4)], [np.array(given["l_second"])], given["Lmax"])
    assert got == pytest.approx(outputs["second_capped"])
    fifth = build("dapo", baseline="none", normalize="none")
    assert fifth.credits([np.zeros(2)], [np.array([800, 900])], LIMIT)[0].tolist() == [0.0, -0.5]


def test_worked_importance() -> None:
    given, outputs = VECTORS["tis"]["inputs"], VECTORS["tis"]["outputs"]
    drawn = sample([1, 2, 3, 4], 1, engine_logprob=given["logp_rollout"])
    for options, key in (
        ({"importance": "truncate", "importance_cap": given["cap"]}, "weight"),
        ({"importance": "mask", "importance_low": 0.5, "importance_high": 2.0}, "icepop_0_5_2"),
    ):
        batch = pack([drawn], [0], {0: 1.0}, CPU)
        batch.columns["old_logprob"] = torch.tensor(given["logp_train_old"])
        fill_importance([batch], objective(build("rloo", **options)).importance)
        assert batch.columns["importance"].tolist() == pytest.approx(outputs[key], abs=1e-4)
