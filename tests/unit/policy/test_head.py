"""The fused head in Megatron's schedule, on one rank: gradients, the factor promised, what is never
held or written.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from megatron_efr.algorithms import Objective
from megatron_efr.config import OptimizerConfig, ParallelConfig
from megatron_efr.kernels import matmul
from megatron_efr.policy import Policy, Ranks, policy_loss, supervised_loss
from megatron_efr.policy.head import loss_scaling
from megatron_efr.samples import PackedBatch
from megatron_efr.types import UserError
from tests.conftest import make_model_folder
from tests.groups import sample
from tests.parallel import head
from tests.policies import make_policy

PPO = policy_loss(Objective())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models")
    for name in ("tied", "untied"):
        make_model_folder(folder / name, tied=name == "tied")
    return str(folder)


def build(models: str, ranks: Ranks) -> tuple[Policy, list[PackedBatch]]:
    policy = head.build(head.PLAIN, models, ParallelConfig(), ranks)
    return policy, head.batches(policy, head.PLAIN._replace(several=True))


@pytest.mark.parametrize("case", head.CASES, ids=str)
def test_gradients_equal_autograd_through_all_logits(
    case: head.Case, models: str, ranks: Ranks
) -> None:
    apart = head.compare(case, models, ParallelConfig(), ranks)
    assert max(apart.values()) <= 1e-5, apart


def test_the_first_update_is_exact_in_small_chunks_with_rows_left_out(
    models: str, ranks: Ranks
) -> None:
    policy, batches = build(models, ranks)
    policy.score(batches)
    assert any(0 < batch.live_rows < len(batch.targets) for batch in batches), (
        "sequences of advantage 0 are last"
    )
    metrics = policy.update(batches, PPO)
    assert metrics["ratio_max"] == 1.0
    assert metrics["kl_to_old"] == metrics["clip_fraction"] == 0.0


def test_no_more_logits_than_a_chunk(
    models: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    def counted(out: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows.append(len(out))
        return matmul.logits_into(out, hidden, weight)

    # the module shares its function's name; the fused loss makes its logits there too
    monkeypatch.setattr(
        importlib.import_module("megatron_efr.kernels.linear_logprob"), "logits_into", counted
    )
    policy, batches = build(models, ranks)
    for loss, times in ((PPO, 1), (supervised_loss, 2)):
        rows.clear()
        policy.update(batches, loss)
        assert sum(rows) == times * sum(len(batch.targets) for batch in batches), (
            "computed once, or again in backward"
        )
        assert max(rows) == 7


def test_nothing_is_written_by_a_forward_pass_alone(models: str, ranks: Ranks) -> None:
    policy, batches = build(models, ranks)
    policy.optimizer.zero_grad()
    policy._run(batches, PPO, forward_only=True)
    for name, gradient in policy.named_gradients():
        assert torch.all(gradient == 0), name


def test_a_loss_that_arrives_otherwise_scaled_stops_the_update(models: str, ranks: Ranks) -> None:
    policy, batches = build(models, ranks)
    with pytest.raises(
        RuntimeError, match=r"scaled by 3\.0, and its gradients were written for a factor of 1\.0"
    ):
        policy.update(batches, lambda rows: (PPO(rows)[0] * 3.0, {}))


def test_the_optimizers_own_loss_scale_is_promised(models: str, ranks: Ranks) -> None:
    """Only the optimizers with a gradient scaler have one: bf16's, and the distributed one."""
    norms = []
    for scale in ({}, {"loss_scale": 4096.0}):
        parallel = ParallelConfig(ddp={"use_distributed_optimizer": True})
        optimizer = OptimizerConfig(lr=1e-3, clip_grad=0.0, megatron=scale)
        policy = make_policy(f"{models}/untied", ranks, parallel=parallel, optimizer=optimizer)
        norms.append(policy.update(head.batches(policy, head.PLAIN), PPO)["grad_norm"])
        assert loss_scaling(policy.config, ranks, 3) == (1.0, scale.get("loss_scale", 1.0))
    assert norms[0] == norms[1], "a power of 2 changes no bit"


def test_gradients_reduced_in_bf16_go_through_autograd(ranks: Ranks, tmp_path: Path) -> None:
    path = make_model_folder(tmp_path / "bf16", tied=True, dtype=torch.bfloat16)
    gradients: list[dict[str, torch.Tensor]] = []
    for fp32 in (True, False):
        policy = make_policy(
            path,
            ranks,
            parallel=ParallelConfig(ddp={"grad_reduce_in_fp32": fp32}),
            optimizer=OptimizerConfig(lr=1e-3, clip_grad=0.0),
            dtype="bfloat16",
        )
        batches = head.batches(policy, head.PLAIN)
        assert cast(Any, policy._head).weight.main_grad.dtype == (
            torch.float32 if fp32 else torch.bfloat16
        )
        policy.update(batches, PPO)
        gradients.append(
            {name: gradient.float().clone() for name, gradient in policy.named_gradients()}
        )
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() <= 5e-3 * gradient.norm(), name


def test_the_chunk_is_configured(models: str, ranks: Ranks) -> None:
    assert cast(Any, build(models, ranks)[0])._head.chunk == 7
    plain: Any = make_policy(f"{models}/tied", ranks)
    assert plain._head.chunk == 2048


@pytest.mark.parametrize("token", [-1, 61])
def test_tokens_outside_the_vocabulary_are_refused_before_they_are_packed(
    token: int, models: str, ranks: Ranks
) -> None:
    policy, _ = build(models, ranks)
    sequences = [*head.sequences(), sample([1, 2, token], 1)]
    with pytest.raises(
        UserError, match=rf"sequence 12 holds token id {token}, .* vocabulary is 61"
    ):
        policy.pack_update(sequences, list(range(13)), 100, "token")
