"""The Megatron policy against transformers and an independent fp64 implementation of the whole
loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM

from megatron_efr.algorithms import Objective
from megatron_efr.config import ConfigError, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_efr.policy import Policy, Ranks, policy_loss, split_into_updates, supervised_loss
from megatron_efr.policy.packing import pack
from megatron_efr.samples import PackedBatch, Sample
from tests.conftest import make_model_folder, ragged_sequences
from tests.groups import with_columns
from tests.policies import make_policy

SGD: dict[str, Any] = {"optimizer": "sgd", "sgd_momentum": 0.0}


def build(path: Path, ranks: Ranks, **changes: Any) -> Policy:
    optimizer = OptimizerConfig(
        lr=changes.pop("lr", 1e-3), clip_grad=0.0, megatron=changes.pop("megatron", {})
    )
    return make_policy(path, ranks, optimizer=optimizer, updates=10, **changes)


def exact_logprobs(
    model: Qwen2ForCausalLM, sequence: Sample, temperature: float = 1.0
) -> torch.Tensor:
    """Response log-probs from a full forward pass of transformers, at the model's own precision."""
    logits = model(torch.tensor(sequence.tokens)[None].long()).logits[
        0, sequence.prompt_length - 1 : -1
    ]
    targets = torch.tensor(sequence.tokens[sequence.prompt_length :]).long()
    return torch.log_softmax(logits / temperature, -1).gather(1, targets[:, None])[:, 0]


def by_sequence(batches: list[PackedBatch], values: list[torch.Tensor]) -> dict[int, torch.Tensor]:
    return {
        i: part
        for batch, value in zip(batches, values, strict=True)
        for i, part in zip(batch.indices, value.split(batch.row_lengths), strict=True)
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_transformers(
    tied: bool, temperature: float, tied_model: Path, untied_model: Path, ranks: Ranks
) -> None:
    path = tied_model if tied else untied_model
    sequences = ragged_sequences(24)
    policy = build(path, ranks, temperature=temperature)
    batches = policy.pack_update(sequences, list(range(24)), 300, "sequence")
    assert len(batches) > 3, "several micro-batches, or this shows little"
    got = by_sequence(batches, policy.logprobs(batches))
    model = Qwen2ForCausalLM.from_pretrained(path)
    with torch.no_grad():
        worst = max(
            float((got[i] - exact_logprobs(model, s, temperature)).abs().max())
            for i, s in enumerate(sequences)
        )
    assert worst <= 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_folder_written_back_is_the_folder_read(
    tied: bool, tied_model: Path, untied_model: Path, ranks: Ranks, tmp_path: Path
) -> None:
    path = tied_model if tied else untied_model
    build(path, ranks).save_folder(tmp_path / "out")
    before, after = (
        load_file(path / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert before.keys() - {"lm_head.weight"} == after.keys() - {"lm_head.weight"}
    assert all(torch.equal(before[name], after[name]) for name in after)
    tokens = torch.arange(40)[None] % 61
    with torch.no_grad():
        logits = [
            Qwen2ForCausalLM.from_pretrained(p)(tokens).logits for p in (path, tmp_path / "out")
        ]
    assert torch.equal(logits[0], logits[1])


def fp64_loss(
    model: Qwen2ForCausalLM,
    sequences: list[Sample],
    old: dict[int, torch.Tensor],
    advantages: dict[int, torch.Tensor],
    clip: float,
    aggregate: str,
) -> torch.Tensor:
    """PPO's clipped loss over whole sequences, written out, one sequence at a time."""
    total_tokens = sum(s.response_length for s in sequences)
    losses = []
    for i, sequence in enumerate(sequences):
        ratio = (exact_logprobs(model, sequence) - old[i].double()).exp()
        a = advantages[i].double()
        terms = -torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
        losses.append(
            terms.mean() / len(sequences) if aggregate == "sequence" else terms.sum() / total_tokens
        )
    return torch.stack(losses).sum()


@pytest.mark.parametrize("aggregate", ["sequence", "token"])
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradient_equal_fp64(
    aggregate: Any, seed: int, tied_model: Path, ranks: Ranks
) -> None:
    sequences = ragged_sequences(17, seed)
    policy = build(tied_model, ranks)
    batches = policy.pack_update(sequences, list(range(17)), 250, aggregate)
    policy.score(batches)
    generator = torch.Generator().manual_seed(seed)
    # old log-probs off by up to several clip widths, so that clipping bites on both sides
    for batch in batches:
        batch.columns["old_logprob"] += 0.3 * torch.randn(len(batch.targets), generator=generator)
        batch.columns["advantage"] = torch.randn(len(batch.targets), generator=generator)
    old = by_sequence(batches, [b.columns["old_logprob"] for b in batches])
    advantages = by_sequence(batches, [b.columns["advantage"] for b in batches])

    metrics = policy.update(batches, policy_loss(Objective()))
    assert 0.1 < metrics["clip_fraction"] < 0.9
    model = Qwen2ForCausalLM.from_pretrained(tied_model, dtype=torch.float64)
    exact = fp64_loss(model, sequences, old, advantages, 0.2, aggregate)
    exact.backward()
    assert metrics["loss"] == pytest.approx(float(exact.detach()), rel=1e-5)
    wanted = {name: p.grad for name, p in model.named_parameters()}
    for name, gradient in policy.named_gradients():
        want = wanted[name]
        assert want is not None
        assert float((gradient.double() - want).norm() / want.norm()) <= 1e-5, name
    norm = float(
        torch.stack([g.norm() ** 2 for g in wanted.values() if g is not None]).sum().sqrt()
    )
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_supervised_loss_is_the_mean_negative_log_likelihood(
    untied_model: Path, ranks: Ranks
) -> None:
    sequences = ragged_sequences(9)
    policy = build(untied_model, ranks)
    batches = policy.pack_update(sequences, list(range(9)), 200, "token")
    metrics = policy.update(batches, supervised_loss)
    model = Qwen2ForCausalLM.from_pretrained(untied_model, dtype=torch.float64)
    with torch.no_grad():
        exact = -torch.cat([exact_logprobs(model, s) for s in sequences]).mean()
    assert metrics["loss"] == pytest.approx(float(exact), rel=1e-6)


def test_packing_changes_nothing(tied_model: Path, ranks: Ranks) -> None:
    sequences = ragged_sequences(32)
    results = []
    for budget in (90, 300, 100_000):
        policy = build(tied_model, ranks, megatron=SGD)
        batches = policy.pack_update(sequences, list(range(32)), budget, "sequence")
        policy.score(batches)
        logprobs = by_sequence(batches, [b.columns["old_logprob"] for b in batches])
        metrics = policy.update(batches, policy_loss(Objective()))
        results.append((len(batches), logprobs, metrics, dict(policy.named_gradients())))
    counts = [count for count, *_ in results]
    assert counts[0] > counts[1] > counts[2] == 1
    _, logprobs, metrics, gradients = results[0]
    for _, other_logprobs, other_metrics, other_gradients in results[1:]:
        assert max(float((logprobs[i] - other_logprobs[i]).abs().max()) for i in logprobs) <= 2e-6
        assert metrics["loss"] == pytest.approx(other_metrics["loss"], abs=1e-6)
        for name, gradient in gradients.items():
            assert float((gradient - other_gradients[name]).norm() / gradient.norm()) <= 2e-6, name


@pytest.mark.parametrize("budget", [300, 100_000])
def test_a_prompt_that_responses_share_is_computed_once_and_changes_nothing(
    budget: int, tied_model: Path, ranks: Ranks
) -> None:
    """Of 8 prompts with 4 responses each, in one micro-batch and in several."""
    drawn = ragged_sequences(32)
    prompts = [np.arange(3 * i, 3 * i + 20 + i, dtype=np.int32) % 61 for i in range(8)]
    sequences = [
        Sample(np.concatenate([prompts[i % 8], s.tokens[s.prompt_length :]]), 20 + i % 8, s.columns)
        for i, s in enumerate(drawn)
    ]
    results = []
    for shares in (True, False):
        policy = build(tied_model, ranks, megatron=SGD)
        assert policy._share_prompts
        policy._share_prompts = shares
        batches = policy.pack_update(sequences, list(range(32)), budget, "sequence")
        policy.score(batches)
        logprobs = by_sequence(batches, [b.columns["old_logprob"] for b in batches])
        metrics = policy.update(batches, policy_loss(Objective()))
        tokens = sum(b.tokens.numel() for b in batches)
        results.append((tokens, logprobs, metrics, dict(policy.named_gradients())))
    (once, logprobs, metrics, gradients), (each, plain, plain_metrics, plain_gradients) = results
    spared = sum(3 * len(prompt) for prompt in prompts)
    # what shares a prompt is in one micro-batch, or in two that it must be parted to
    assert each - once == spared if budget > 300 else 0.7 * spared < each - once < spared
    assert max(float((logprobs[i] - plain[i]).abs().max()) for i in plain) <= 2e-6
    assert metrics["ratio_max"] == plain_metrics["ratio_max"] == 1.0
    assert metrics["loss"] == pytest.approx(plain_metrics["loss"], abs=1e-6)
    for name, gradient in plain_gradients.items():
        assert float((gradient - gradients[name]).norm() / gradient.norm()) <= 2e-6, name


def test_identities_of_the_first_update(tied_model: Path, ranks: Ranks) -> None:
    sequences = ragged_sequences(32)
    policy = build(tied_model, ranks, keep_reference=True)
    updates = [
        policy.pack_update(sequences, u, 300, "sequence") for u in split_into_updates(32, 2, (0, 1))
    ]
    batches = [batch for update in updates for batch in update]
    policy.score(batches)
    for batch in batches:
        old, reference = batch.columns["old_logprob"], batch.columns["reference_logprob"]
        assert torch.equal(old, reference), "a fresh reference: KL exactly 0"
        batch.columns["advantage"] = torch.linspace(-1, 1, len(batch.targets))
    first = policy.update(updates[0], policy_loss(Objective()))
    assert first["ratio_max"] == 1.0
    assert first["kl_to_old"] == 0.0
    assert first["clip_fraction"] == 0.0
    second = policy.update(updates[1], policy_loss(Objective()))
    assert second["ratio_max"] != 1.0, "the weights moved, so the second update must see it"


def test_reference_stays_the_initial_model_and_leaves_no_trace(
    tied_model: Path, ranks: Ranks
) -> None:
    sequences = ragged_sequences(12)
    policy = build(tied_model, ranks, keep_reference=True, lr=1e-2)
    batches = policy.pack_update(sequences, list(range(12)), 400, "sequence")
    policy.score(batches)
    initial = [batch.columns["reference_logprob"].clone() for batch in batches]
    for _ in range(3):
        policy.update(batches, supervised_loss)
    weights = {name: tensor.clone() for name, tensor in policy.named_weights()}
    policy.score(batches)
    assert all(torch.equal(weights[name], tensor) for name, tensor in policy.named_weights())
    for batch, first in zip(batches, initial, strict=True):
        assert torch.equal(batch.columns["reference_logprob"], first)
        assert (batch.columns["old_logprob"] - first).abs().max() > 1e-2, (
            "three updates at 1e-2 are far from the start"
        )


def test_sgd_step_is_minus_lr_times_gradient(tied_model: Path, ranks: Ranks) -> None:
    sequences = ragged_sequences(6)
    policy = build(tied_model, ranks, megatron=SGD, lr=0.1)
    before = {name: tensor.clone() for name, tensor in policy.named_weights()}
    policy.update(policy.pack_update(sequences, list(range(6)), 400, "token"), supervised_loss)
    gradients = dict(policy.named_gradients())
    for name, after in policy.named_weights():
        assert (after - (before[name] - 0.1 * gradients[name])).abs().max() <= 1e-6, name


def test_a_gradient_that_is_not_finite_is_skipped_and_said(tied_model: Path, ranks: Ranks) -> None:
    sequences = ragged_sequences(6)
    policy = build(tied_model, ranks)
    batches = policy.pack_update(sequences, list(range(6)), 400, "sequence")
    policy.score(batches)
    for batch in batches:
        batch.columns["advantage"] = torch.full((len(batch.targets),), float("nan"))
    before = {name: tensor.clone() for name, tensor in policy.named_weights()}
    metrics = policy.update(batches, policy_loss(Objective()))
    assert metrics["skipped"] == 1.0
    assert np.isnan(metrics["grad_norm"])
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.named_weights())


def test_compare_logprobs_measures_engine_and_reference(tied_model: Path, ranks: Ranks) -> None:
    policy = build(tied_model, ranks, keep_reference=True)
    plain = ragged_sequences(8)
    batches = policy.pack_update(plain, list(range(8)), 400, "sequence")
    policy.score(batches)
    exact = by_sequence(batches, [b.columns["old_logprob"] for b in batches])
    shifted = [
        with_columns(s, engine_logprob=(exact[i] + 0.25).numpy()) for i, s in enumerate(plain)
    ]
    batches = policy.pack_update(shifted, list(range(8)), 400, "sequence")
    policy.score(batches)
    drift = policy.compare_logprobs(batches)
    assert drift["logprob_diff_mean"] == pytest.approx(0.25, abs=1e-6)
    assert drift["logprob_diff_max"] == pytest.approx(0.25, abs=1e-5)
    assert drift["kl"] == 0.0


def test_an_empty_micro_batch_adds_nothing(tied_model: Path, ranks: Ranks) -> None:
    sequences = ragged_sequences(6)
    results = []
    for empty in (False, True):
        policy = build(tied_model, ranks)
        batches = policy.pack_update(sequences, list(range(6)), 1000, "sequence")
        if empty:
            batches.append(pack(sequences, [], {}, torch.device("cpu")))
        policy.score(batches)
        for batch in batches:
            batch.columns["advantage"] = torch.ones(len(batch.targets))
        drift = policy.compare_logprobs(batches)
        results.append(
            (
                policy.update(batches, policy_loss(Objective())) | drift,
                dict(policy.named_gradients()),
            )
        )
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


def test_warm_up_and_schedule(tied_model: Path, ranks: Ranks) -> None:
    optimizer = OptimizerConfig(lr=1.0e-3, warmup_updates=4, schedule="cosine")
    policy = make_policy(tied_model, ranks, optimizer=optimizer, updates=8)
    batches = policy.pack_update(ragged_sequences(4), list(range(4)), 400, "token")
    rates = [policy.update(batches, supervised_loss)["lr"] for _ in range(8)]
    cosine = [1e-3 * 0.5 * (1 + np.cos(np.pi * k / 4)) for k in range(1, 5)]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, *cosine], abs=1e-9)


def test_bf16_stays_close_to_fp32(ranks: Ranks, tmp_path: Path) -> None:
    path = make_model_folder(tmp_path / "bf16", tied=True, dtype=torch.bfloat16)
    sequences = ragged_sequences(8)
    policies = {dtype: build(path, ranks, dtype=dtype) for dtype in ("float32", "bfloat16")}
    logprobs = {}
    for dtype, policy in policies.items():
        batches = policy.pack_update(sequences, list(range(8)), 400, "token")
        logprobs[dtype] = torch.cat(policy.logprobs(batches))
        policy.update(batches, supervised_loss)
    difference = (logprobs["float32"] - logprobs["bfloat16"]).abs()
    assert difference.mean() < 3e-2
    assert difference.max() > 1e-4, "bf16 that equals fp32 would be fp32"


def test_bf16s_gradients_of_weights_are_summed_in_fp32_as_they_are_computed(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_model_folder(tmp_path / "bf16", tied=True, dtype=torch.bfloat16)
    sequences = ragged_sequences(8)

    def gradients(dtype: str, fused: bool = False) -> dict[str, torch.Tensor]:
        # where the processor has no such product, operands are widened first
        monkeypatch.setattr("megatron_efr.policy.model.summed_in_float32", lambda: fused)
        policy = build(path, ranks, dtype=dtype)
        assert policy.config.gradient_accumulation_fusion == fused
        batches = policy.pack_update(sequences, list(range(8)), 100, "token")
        assert len(batches) > 3
        policy.update(batches, supervised_loss)
        return {name: gradient.clone() for name, gradient in policy.named_gradients()}

    exact, apart, fused = gradients("float32"), gradients("bfloat16"), gradients("bfloat16", True)
    assert fused.keys() == apart.keys() == exact.keys()
    for name, gradient in fused.items():
        assert (gradient - apart[name]).norm() <= 5e-3 * gradient.norm(), name
    # without the rounding of each micro-batch's own
    layers = [name for name in fused if name.endswith("proj.weight")]
    error, rounded = (
        sum(float((found[name] - exact[name]).norm()) for name in layers)
        for found in (fused, apart)
    )
    assert error < rounded
    assert any(not torch.equal(fused[name], apart[name]) for name in layers)


RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@pytest.mark.parametrize("section", ["model.megatron", "parallel.ddp", "optimizer.megatron"])
def test_pass_through_fields_reach_megatron_or_are_refused(
    section: str, tied_model: Path, ranks: Ranks
) -> None:
    bad = {"no_such_field": 1}
    model = ModelConfig(
        path=str(tied_model), megatron=bad if section == "model.megatron" else RECOMPUTE
    )
    parallel = ParallelConfig(ddp=bad if section == "parallel.ddp" else {})
    optimizer = OptimizerConfig(lr=1e-3, megatron=bad if section == "optimizer.megatron" else SGD)
    with pytest.raises(ConfigError, match=rf"{section}\.no_such_field"):
        Policy(model, parallel, optimizer, ranks, updates=1, seed=0)
    good = make_policy(tied_model, ranks, megatron=RECOMPUTE)
    assert good.config.recompute_granularity == "full"


def test_recompute_gives_the_same_gradient(tied_model: Path, ranks: Ranks) -> None:
    sequences = ragged_sequences(10)
    gradients = []
    for megatron in ({}, RECOMPUTE):
        policy = make_policy(
            tied_model, ranks, optimizer=OptimizerConfig(lr=1e-3, clip_grad=0.0), megatron=megatron
        )
        policy.update(policy.pack_update(sequences, list(range(10)), 300, "token"), supervised_loss)
        gradients.append(dict(policy.named_gradients()))
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
