"""Routing replay: the engine's experts with the policy's own weights for them, in every pass; and
what is refused.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_efr.algorithms import Objective
from megatron_efr.config import (
    ConfigError,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_efr.config.file import validate
from megatron_efr.errors import UserError
from megatron_efr.policy import Policy, Ranks, check_fit, policy_loss, supervised_loss
from megatron_efr.rollout.build import build_engine
from megatron_efr.rollout.codec import NoText
from megatron_efr.rollout.servers.run_servers import Servers
from megatron_efr.rollout.sglang.routed_experts import decode_routing
from megatron_efr.run.checks import check_configuration
from megatron_efr.samples import Sample
from megatron_efr.weights.architecture import Architecture
from tests.conftest import ragged_sequences
from tests.families import make_family_folder
from tests.policies import make_policy
from tests.routing import as_sampled_by, change_weights, make_moe_folder, randomly_routed

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MOE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
FIRST = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}

MakePolicy = Callable[..., Policy]


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe_folder(tmp_path_factory.mktemp("models") / "moe")


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight experts to a token: the order in which their softmax is summed is felt."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    return make_family_folder(folder, "qwen3-moe", num_experts=16, num_experts_per_tok=8)


@pytest.fixture(scope="session")
def make(moe: Path, ranks: Ranks) -> MakePolicy:
    def make(path: Path = moe, *, keep_reference: bool = False, **model: Any) -> Policy:
        return make_policy(
            path,
            ranks,
            optimizer=OptimizerConfig(lr=1e-3, clip_grad=0.0),
            keep_reference=keep_reference,
            **model,
        )

    return make


def logprobs(policy: Policy, sequences: list[Sample], budget: int = 600) -> list[torch.Tensor]:
    batches = policy.pack_update(sequences, list(range(len(sequences))), budget, "sequence")
    found = {
        i: part
        for batch, values in zip(batches, policy.logprobs(batches), strict=True)
        for i, part in zip(batch.indices, values.split(batch.row_lengths), strict=True)
    }
    return [found[i] for i in range(len(sequences))]


def gradients(
    policy: Policy, sequences: list[Sample], budget: int = 300
) -> dict[str, torch.Tensor]:
    policy.update(
        policy.pack_update(sequences, list(range(len(sequences))), budget, "sequence"),
        supervised_loss,
    )
    return {name: gradient.clone() for name, gradient in policy.named_gradients()}


def test_replaying_its_own_choice_changes_no_bit(make: MakePolicy) -> None:
    sequences, own = as_sampled_by(make(), ragged_sequences(16))
    policy = make(routing="replay", keep_reference=True)
    assert all(torch.equal(a, b) for a, b in zip(logprobs(policy, sequences), own, strict=True))
    batches = policy.pack_update(sequences, list(range(16)), 600, "sequence")
    policy.score(batches)
    assert policy.compare_logprobs(batches)["kl"] == 0, (
        "a fresh reference chooses the same by itself"
    )
    plain, replayed = gradients(make(), sequences), gradients(policy, sequences)
    # sequences' last tokens, whose gradients are 0, add rows to the first experts' products
    for name in plain:
        first = (
            name.startswith("model.layers.")
            and 0 <= int(name.partition("experts.")[2].partition(".")[0] or -1) < 4
        )
        assert float((plain[name] - replayed[name]).norm()) <= first * 1e-6 * float(
            plain[name].norm()
        ), name


def test_the_first_update_of_a_mixture_sees_a_ratio_of_exactly_1(
    make: MakePolicy, wide: Path
) -> None:
    """Log-probs are computed without gradients, updates with them: routing and rounding must be the
    same in both.
    """
    policy = make(wide)
    sequences = ragged_sequences(24)
    batches = policy.pack_update(sequences, list(range(24)), 600, "sequence")
    policy.score(batches)
    for batch in batches:
        batch.columns["advantage"] = torch.linspace(-1, 1, len(batch.targets))
    first = policy.update(batches, policy_loss(Objective()))
    assert (first["ratio_max"], first["kl_to_old"], first["clip_fraction"]) == (1.0, 0.0, 0.0)


def test_the_order_of_a_tokens_experts_changes_no_bit(make: MakePolicy, wide: Path) -> None:
    """Engines list them as they like."""
    sequences = randomly_routed(ragged_sequences(8), 2, 16, 8)
    rng = np.random.default_rng(0)
    mixed = [
        replace(s, routed_experts=rng.permuted(cast(np.ndarray, s.routed_experts), axis=-1))
        for s in sequences
    ]
    one, other = (logprobs(make(wide, routing="replay"), asked) for asked in (sequences, mixed))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("recompute", [FULL, MOE, FIRST], ids=["full", "moe", "first layer"])
def test_recomputation_takes_the_same_experts(recompute: dict[str, Any], make: MakePolicy) -> None:
    sequences = randomly_routed(ragged_sequences(16), 4, 16, 4)
    kept, again = (
        gradients(make(routing="replay", megatron=m), sequences) for m in ({}, recompute)
    )
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    own = gradients(make(), sequences)
    gate = "model.layers.0.mlp.gate.weight"
    assert float((own[gate] - kept[gate]).norm() / kept[gate].norm()) > 0.5, (
        "these are other experts"
    )


def test_transformers_with_the_same_experts_gives_the_same_numbers(
    make: MakePolicy, moe: Path
) -> None:
    """Log-probs, and the gradient of every parameter: routers learn from the weights of what was
    chosen for them.
    """
    sequences = randomly_routed(ragged_sequences(6), 4, 16, 4)
    policy, model = make(routing="replay"), AutoModelForCausalLM.from_pretrained(moe)
    routing = torch.empty(0)
    for number, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(
            lambda _, __, out, number=number: _choose(out[0], routing[:, number])
        )
    for sequence, mine in zip(sequences, logprobs(policy, sequences), strict=True):
        assert sequence.routed_experts is not None
        last = np.arange(4, dtype=np.int8)[None, None].repeat(4, 1)
        routing = torch.from_numpy(np.concatenate([sequence.routed_experts, last])).long()
        logits = model(torch.tensor(sequence.tokens)[None].long()).logits[
            0, sequence.prompt_length - 1 : -1
        ]
        targets = torch.tensor(sequence.tokens[sequence.prompt_length :]).long()
        theirs = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
        assert float((mine - theirs.detach()).abs().max()) <= 1e-5
        (-theirs.mean() / len(sequences)).backward()
    found = gradients(policy, sequences)
    for number in range(4):
        name = f"model.layers.{number}.mlp.gate.weight"
        theirs = dict(model.named_parameters())[name].grad
        assert theirs is not None
        assert float(theirs.norm()) > 1e-3
        assert float((found[name] - theirs).norm() / theirs.norm()) <= 1e-5


def _choose(logits: torch.Tensor, experts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weights = torch.softmax(logits, -1).gather(1, experts)
    return logits, weights / weights.sum(-1, keepdim=True), experts


@pytest.mark.parametrize("engine", ["noise", "bfloat16"])
def test_replay_removes_what_flipped_experts_add(
    engine: str, make: MakePolicy, moe: Path, tmp_path: Path
) -> None:
    """An engine that is a little off: what remains is its own error, if it chose the same experts
    anyway.
    """
    torch.manual_seed(1)
    noisy = change_weights(
        moe, tmp_path / "noisy", lambda _, w: w * (1 + 1e-4 * torch.randn_like(w))
    )
    sampler = make(noisy) if engine == "noise" else make(dtype="bfloat16")
    sequences, sampled = as_sampled_by(sampler, ragged_sequences(48))
    chosen, own = as_sampled_by(make(), sequences)
    after_flip = torch.cat([_after_flip(a, b) for a, b in zip(sequences, chosen, strict=True)])
    apart = torch.cat([(a - b).abs() for a, b in zip(own, sampled, strict=True)])
    replayed = logprobs(make(routing="replay"), sequences)
    together = torch.cat([(a - b).abs() for a, b in zip(replayed, sampled, strict=True)])
    print(
        f"{engine}: {after_flip.double().mean():.1%} of tokens at or after a flipped expert; own "
        f"routing: mean {apart.mean():.1e}, max {apart.max():.1e}; replay: mean "
        f"{together.mean():.1e}, max {together.max():.1e}"
    )
    assert 0.05 < after_flip.double().mean() < 0.95
    assert torch.allclose(apart[~after_flip], together[~after_flip], atol=1e-6)
    assert float(apart.max()) > 5 * float(together.max())
    assert float(apart.mean()) > 1.5 * float(together.mean())
    assert float(together.max()) < 1.5 * float(together[~after_flip].max())


def _after_flip(one: Sample, other: Sample) -> torch.Tensor:
    """Response tokens predicted at or behind a token that had other experts in the other's
    sequence.
    """
    assert one.routed_experts is not None
    assert other.routed_experts is not None
    flipped = (np.sort(one.routed_experts) != np.sort(other.routed_experts)).any((1, 2))
    return torch.from_numpy(np.logical_or.accumulate(flipped))[one.prompt_length - 1 :]


def test_a_servers_routing_is_read_as_it_was_written(moe: Path) -> None:
    model = Architecture.from_folder(moe)
    chosen = np.random.default_rng(0).integers(0, 16, (9, 4, 4), dtype=np.int32)
    encoded = base64.b64encode(chosen.tobytes()).decode()
    read = decode_routing(encoded, 9, model)
    assert read.dtype == np.int8
    assert np.array_equal(read, chosen)
    with pytest.raises(
        ValueError, match="are not the int32 choices of 8 tokens in 4 layers of 4 experts"
    ):
        decode_routing(encoded, 8, model)
    with pytest.raises(ValueError, match="-1 to 15, of experts 0 to 15"):
        decode_routing(
            base64.b64encode(np.where(chosen == 0, -1, chosen).tobytes()).decode(), 9, model
        )


def test_what_cannot_be_replayed_is_named(make: MakePolicy, moe: Path, tied_model: Path) -> None:
    policy = make(routing="replay")
    (plain,) = ragged_sequences(1)
    (routed,) = randomly_routed([plain], 4, 16, 4)
    assert routed.routed_experts is not None
    with pytest.raises(UserError, match="a response came without"):
        policy.pack_update([plain], [0], 100, "token")
    with pytest.raises(
        UserError, match=r"routing is \[\d+, 3, 4\], and the policy's model has \[\d+, 4, 4\]"
    ):
        policy.pack_update(
            [replace(routed, routed_experts=routed.routed_experts[:, :3])], [0], 100, "token"
        )
    with pytest.raises(UserError, match="model has 0 to 15"):
        policy.pack_update(
            [replace(routed, routed_experts=routed.routed_experts + 1)], [0], 100, "token"
        )
    with pytest.raises(ConfigError, match="replay is for a mixture of experts"):
        check_fit(ModelConfig(path=str(tied_model), routing="replay"), ParallelConfig())
    with (
        pytest.raises(ConfigError, match="an engine that returns the experts it chose"),
        ExitStack() as stack,
    ):
        build_engine(
            ModelConfig(path=str(moe), routing="replay"),
            Architecture.from_folder(moe),
            RolloutConfig(),
            Servers(),
            moe,
            NoText(),
            stack,
        )
    tree = {
        "name": "x", "model": {"path": str(moe), "routing": "replay"},
        "data": {"datasets": [{"path": "x"}]},
        "method": {"name": "efr", "alpha": 0.1}, "optimizer": {"lr": 1e-4},
        "rollout": {"engine": "sglang", "router": True},
    }  # fmt: skip
    config = validate(TrainConfig, tree)
    with pytest.raises(
        ConfigError, match=r"^rollout\.router: .* which model\.routing: replay needs"
    ):
        check_configuration(config, 1)  # before servers are started
    for field, name in (
        ("moe_router_fusion", "fused router"),
        ("moe_enable_routing_replay", "set model.routing"),
    ):
        with pytest.raises(ConfigError, match=name):
            check_fit(
                ModelConfig(path=str(moe), routing="replay", megatron={field: True}),
                ParallelConfig(),
            )
