"""Megatron's optimizers as the policy sets them up: schedule, clipping, leaving the device, being
saved at any time.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_efr.algorithms import Objective
from megatron_efr.checkpoint.checkpoints import Checkpoints
from megatron_efr.config import (
    CheckpointConfig,
    ConfigError,
    OptimizerConfig,
    ParallelConfig,
)
from megatron_efr.policy import Policy, Ranks, policy_loss, supervised_loss
from tests.conftest import ragged_sequences
from tests.policies import make_policy

SHARDED: dict[str, Any] = {"use_distributed_optimizer": True}
OVERLAPPED = SHARDED | {
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "bucket_size": 3000,
}


def build(
    path: Path,
    ranks: Ranks,
    ddp: dict[str, Any] | None = None,
    dtype: Any = "float32",
    **optimizer: Any,
) -> Policy:
    return make_policy(
        path,
        ranks,
        parallel=ParallelConfig(ddp=ddp or {}),
        optimizer=OptimizerConfig(**{"lr": 1e-3, "clip_grad": 0.0} | optimizer),
        updates=8,
        keep_reference=True,
        dtype=dtype,
    )


def update(policy: Policy, advantage: float | None = None) -> dict[str, float]:
    sequences = ragged_sequences(4)
    batches = policy.pack_update(sequences, list(range(4)), 400, "token")
    if advantage is None:
        return policy.update(batches, supervised_loss)
    policy.score(batches)
    for batch in batches:
        batch.columns["advantage"] = torch.full((len(batch.targets),), advantage)
    return policy.update(batches, policy_loss(Objective()))


def state(policy: Policy) -> list[torch.Tensor]:
    """Every tensor of the weights and of the optimizer."""
    weights = [tensor.clone() for _, tensor in policy.named_weights()]
    parts = policy.optimizer.megatron.chained_optimizers
    kept = [
        part.optimizer.state[p]
        for part in parts
        for group in part.param_groups
        for p in group["params"]
    ]
    return weights + [tensor.clone() for entry in kept for _, tensor in sorted(entry.items())]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("schedule", "closed_form"),
    [
        ("constant", lambda k: 1.0),
        ("cosine", lambda k: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(k - 3, 5) / 5))),
    ],
)
def test_the_learning_rate_warms_up_and_follows_its_closed_form(
    schedule: str, closed_form: Any, tied_model: Path, ranks: Ranks
) -> None:
    """Eight updates are announced; a ninth stays at the end."""
    policy = build(tied_model, ranks, lr=2e-3, min_lr=2e-4, schedule=schedule, warmup_updates=3)
    rates = [update(policy)["lr"] for _ in range(9)]
    wanted = [2e-3 * (k / 3 if k <= 3 else closed_form(k)) for k in range(1, 10)]
    assert rates == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("share", [0.25, 4.0])
def test_clipping_scales_the_gradient_to_the_norm_and_leaves_a_smaller_one_alone(
    share: float, tied_model: Path, ranks: Ranks
) -> None:
    """SGD moves by -lr times what was left of the gradient; `share` is the limit over the
    gradient's norm.
    """
    sgd = {"optimizer": "sgd", "sgd_momentum": 0.0}
    free = build(tied_model, ranks, lr=0.5, megatron=sgd)
    norm = update(free)["grad_norm"]
    clipped = build(tied_model, ranks, lr=0.5, megatron=sgd, clip_grad=share * norm)
    before = {name: tensor.clone() for name, tensor in clipped.named_weights()}
    assert update(clipped)["grad_norm"] == norm, "the norm before clipping"
    moved = {name: tensor - before[name] for name, tensor in clipped.named_weights()}
    for name, tensor in free.named_weights():
        whole = tensor - before[name]
        rounding = 2.0**-23 * float(before[name].norm())
        assert (
            float((moved[name] - min(share, 1.0) * whole).norm())
            <= 1e-5 * float(whole.norm()) + rounding
        ), name


@pytest.mark.parametrize("ddp", [{}, SHARDED, OVERLAPPED], ids=["plain", "sharded", "overlapped"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_state_that_left_the_device_comes_back_as_it_was(
    ddp: dict[str, Any], dtype: str, tied_model: Path, ranks: Ranks, tmp_path: Path
) -> None:
    stayed, left, resumed = (build(tied_model, ranks, ddp, dtype) for _ in range(3))
    for policy in (stayed, left):
        update(policy)
    batches = left.pack_update(ragged_sequences(4), list(range(4)), 400, "token")
    logprobs = left.logprobs(batches)
    gradients = [buffer.grad_data for chunk in left.chunks for buffer in chunk.buffers]
    left.offload_training_state()
    assert all(buffer.untyped_storage().nbytes() == 0 for buffer in gradients)
    with pytest.raises(
        RuntimeError, match="offload: gradients and optimizer state have been offloaded"
    ):
        left.offload_training_state()
    with pytest.raises(RuntimeError, match="restore them first"):
        left.update(batches, supervised_loss)
    with pytest.raises(
        RuntimeError,
        match="load the optimizer: gradients and optimizer state have been offloaded",
    ):
        left.sharded_state(loading=True)
    assert equal(left.logprobs(batches), logprobs), "weights can be read meanwhile"
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), ranks)
    path = checkpoints.save(1, left.sharded_state(), {})
    resumed.load_sharded_state(checkpoints.load(path, resumed.sharded_state(loading=True))[0])
    left.restore_training_state()
    with pytest.raises(RuntimeError, match="they are in place"):
        left.restore_training_state()
    assert equal(state(left), state(stayed))
    assert equal(state(resumed), state(stayed)), "a checkpoint that was saved meanwhile"
    for policy in (stayed, left):
        update(policy)
    assert equal(state(left), state(stayed))


@pytest.mark.parametrize("ddp", [{}, SHARDED], ids=["plain", "sharded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_optimizer_that_has_only_skipped_steps_is_saved_and_resumed_like_any_other(
    ddp: dict[str, Any], dtype: str, tied_model: Path, ranks: Ranks, tmp_path: Path
) -> None:
    policy, resumed = (build(tied_model, ranks, ddp, dtype) for _ in range(2))
    for count in (1, 2):
        assert update(policy, math.nan)["skipped"] == 1.0
        assert policy.optimizer.skipped_in_a_row == count
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), ranks)
    path = checkpoints.save(1, policy.sharded_state(), {})
    sharded, _ = checkpoints.load(path, resumed.sharded_state(loading=True))
    resumed.load_sharded_state(sharded)
    assert resumed.optimizer.skipped_in_a_row == 2
    assert update(policy) == update(resumed)
    assert policy.optimizer.skipped_in_a_row == resumed.optimizer.skipped_in_a_row == 0
    assert equal(state(policy), state(resumed))


def test_what_megatrons_optimizers_cannot_do_here_is_refused_with_what_it_needs(
    tied_model: Path, ranks: Ranks
) -> None:
    message = (
        "optimizer.megatron.optimizer: Megatron's distributed optimizer knows adam only, not 'sgd'"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(tied_model, ranks, SHARDED, megatron={"optimizer": "sgd"})
    offload = {"optimizer_cpu_offload": True}
    message = (
        "optimizer.megatron.optimizer_cpu_offload: Megatron's offloading also needs a GPU; "
        "Transformer Engine"
    )
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        build(tied_model, ranks, megatron=offload)
    for need in (
        "parallel.ddp.use_distributed_optimizer: true",
        "optimizer.megatron.use_precision_aware_optimizer: true",
        "optimizer.megatron.optimizer_offload_fraction above 0",
        "model.dtype: bfloat16",
    ):
        assert need in str(refused.value)
    offload |= {"use_precision_aware_optimizer": True, "optimizer_offload_fraction": 1.0}
    with pytest.raises(ConfigError, match=r"needs a GPU; Transformer Engine [^;]*$"):
        build(tied_model, ranks, SHARDED, "bfloat16", megatron=offload)


@pytest.mark.parametrize("ddp", [{}, SHARDED], ids=["plain", "sharded"])
def test_torchs_adam_takes_one_pass_on_a_cpu_whatever_a_checkpoint_says(
    ddp: dict[str, Any], tied_model: Path, ranks: Ranks, tmp_path: Path
) -> None:
    policy, resumed = (build(tied_model, ranks, ddp) for _ in range(2))
    groups = [
        [
            group
            for part in each.optimizer.megatron.chained_optimizers
            for group in part.param_groups
        ]
        for each in (policy, resumed)
    ]
    assert all(group["fused"] is True for group in groups[0])
    for group in groups[0]:  # as one from a GPU does
        group["fused"] = None
    update(policy)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), ranks)
    path = checkpoints.save(1, policy.sharded_state(), {})
    resumed.load_sharded_state(checkpoints.load(path, resumed.sharded_state(loading=True))[0])
    parts = resumed.optimizer.megatron.chained_optimizers
    assert all(group["fused"] is True for part in parts for group in part.param_groups)
    # and it steps as torch's several passes do
    for each in (policy, resumed):
        update(each)
    for one, several in zip(state(resumed), state(policy), strict=True):
        torch.testing.assert_close(one, several, rtol=1e-5, atol=1e-7)
