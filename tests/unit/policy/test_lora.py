"""Low-rank adapters against transformers with A and B beside its projections, written out, in
fp64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2ForCausalLM

from megatron_efr import convert, inspect_checkpoint
from megatron_efr.algorithms import Objective
from megatron_efr.checkpoint.checkpoints import Checkpoints
from megatron_efr.config import (
    CheckpointConfig,
    ConfigError,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
)
from megatron_efr.errors import UserError
from megatron_efr.memory import trained_count
from megatron_efr.parity import Reference, load, log_probs, random_tokens
from megatron_efr.policy import Policy, Ranks, policy_loss, supervised_loss
from megatron_efr.policy.divisibility import check_fit
from megatron_efr.policy.forward import checkpoint_log_probs
from megatron_efr.policy.lora import adapt
from megatron_efr.policy.model import build_models, linear_layers, transformer_config
from megatron_efr.samples import PackedBatch, Sample
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.lora import merge
from megatron_efr.weights.mapping import WeightMapping
from tests.conftest import ragged_sequences
from tests.families import make_family_folder

PREFIX = "base_model.model."
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def build(
    path: Path, ranks: Ranks, targets: list[Any] = ALL, lr: float = 1e-2, **changes: Any
) -> Policy:
    lora = LoraConfig(rank=4, alpha=6.0, targets=targets)
    model = ModelConfig(path=str(path), lora=lora, **changes)
    optimizer = OptimizerConfig(lr=lr, clip_grad=0.0)
    return Policy(
        model, ParallelConfig(), optimizer, ranks, updates=10, seed=0, keep_reference=True
    )


def trained(policy: Policy, updates: int = 2) -> list[PackedBatch]:
    """After some updates, so that B is not zero; batches with advantages, and log-probs from
    before.
    """
    sequences = ragged_sequences(9)
    batches = policy.pack_update(sequences, list(range(9)), 300, "sequence")
    for _ in range(updates):
        policy.update(batches, supervised_loss)
    policy.score(batches)
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        batch.columns["old_logprob"] += 0.3 * torch.randn(len(batch.targets), generator=generator)
        batch.columns["advantage"] = torch.randn(len(batch.targets), generator=generator)
    return batches


def written_out(
    path: Path, adapters: dict[str, torch.Tensor], scaling: float
) -> tuple[Any, dict[str, torch.Tensor]]:
    """transformers' model in fp64 with the adapters beside its projections, and their tensors,
    which are leaves.
    """
    model: Any = Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float64)
    leaves = {name: tensor.double().requires_grad_() for name, tensor in adapters.items()}
    for name in [name.removesuffix(".lora_A.weight") for name in leaves if "lora_A" in name]:
        a, b = leaves[f"{name}.lora_A.weight"], leaves[f"{name}.lora_B.weight"]
        module = model.get_submodule(name.removeprefix(PREFIX))
        module.register_forward_hook(lambda _, x, y, a=a, b=b: y + scaling * (x[0] @ a.T) @ b.T)
    return model, leaves


def response_logprobs(model: Any, sequence: Sample) -> torch.Tensor:
    logits = model(torch.tensor(sequence.tokens)[None].long()).logits[
        0, sequence.prompt_length - 1 : -1
    ]
    targets = torch.tensor(sequence.tokens[sequence.prompt_length :]).long()
    return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]


def by_sequence(batches: list[PackedBatch], column: str) -> dict[int, torch.Tensor]:
    return {
        i: part
        for batch in batches
        for i, part in zip(
            batch.indices, batch.columns[column].split(batch.row_lengths), strict=True
        )
    }


def test_training_begins_with_the_starting_model_bit_for_bit(
    tied_model: Path, ranks: Ranks
) -> None:
    policy = build(tied_model, ranks)
    plain = Policy(
        ModelConfig(path=str(tied_model)),
        ParallelConfig(),
        OptimizerConfig(lr=1e-3),
        ranks,
        updates=1,
        seed=0,
    )
    weights = dict(policy.named_weights())
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.named_weights())
    batches = plain.pack_update(ragged_sequences(6), list(range(6)), 300, "sequence")
    pairs = zip(policy.logprobs(batches), plain.logprobs(batches), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    adapters = policy.parameters.adapter_tensors()
    assert len(adapters) == 4 * 7 * 2
    assert all(not tensor.any() for name, tensor in adapters.items() if "lora_B" in name)
    for name, tensor in adapters.items():
        if "lora_A" in name:
            assert 0.8 < float(tensor.abs().max()) * tensor.shape[1] ** 0.5 <= 1.0, (
                "uniform within 1 / sqrt(in)"
            )


@pytest.mark.parametrize("targets", [ALL, ["k_proj", "up_proj", "down_proj"]])
def test_logprobs_loss_and_gradients_equal_fp64(
    targets: list[Any], untied_model: Path, ranks: Ranks
) -> None:
    policy = build(untied_model, ranks, targets)
    batches = trained(policy)
    sequences = ragged_sequences(9)
    old, advantages = by_sequence(batches, "old_logprob"), by_sequence(batches, "advantage")
    adapters = policy.parameters.adapter_tensors()
    assert (
        sum(float(tensor.abs().sum()) for name, tensor in adapters.items() if "lora_B" in name)
        > 1.0
    )
    metrics = policy.update(batches, policy_loss(Objective()))

    model, leaves = written_out(untied_model, adapters, scaling=1.5)
    losses = []
    for i, sequence in enumerate(sequences):
        ratio, a = (
            (response_logprobs(model, sequence) - old[i].double()).exp(),
            advantages[i].double(),
        )
        losses.append(-torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean() / len(sequences))
    exact = torch.stack(losses).sum()
    exact.backward()
    assert metrics["loss"] == pytest.approx(float(exact.detach()), rel=1e-5)
    gradients = dict(policy.named_gradients())
    assert gradients.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert float((gradients[name].double() - leaf.grad).norm() / leaf.grad.norm()) <= 1e-5, name
    norm = float(
        torch.stack([leaf.grad.norm() ** 2 for leaf in leaves.values() if leaf.grad is not None])
        .sum()
        .sqrt()
    )
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_merged_weights_are_the_base_and_the_product(
    tied_model: Path, ranks: Ranks, tmp_path: Path
) -> None:
    policy = build(tied_model, ranks)
    before = load_file(tied_model / "model.safetensors")
    batches = trained(policy)
    adapters, weights = policy.parameters.adapter_tensors(), dict(policy.named_weights())
    changed = 0
    for name, weight in weights.items():
        exact = before[name].double()
        module = PREFIX + name.removesuffix(".weight")
        if (a := adapters.get(f"{module}.lora_A.weight")) is not None:
            b = adapters[f"{module}.lora_B.weight"]
            exact = exact + 1.5 * b.double() @ a.double()
            changed += not torch.equal(weight, before[name])
        assert float((weight - exact).abs().max()) <= 1e-7, name
    assert changed == 28
    policy.save_folder(tmp_path / "merged")
    model = Qwen2ForCausalLM.from_pretrained(tmp_path / "merged")
    found = torch.cat(policy.logprobs(batches))
    with torch.no_grad():
        exact = torch.cat(
            [
                response_logprobs(model, ragged_sequences(9)[i])
                for batch in batches
                for i in batch.indices
            ]
        )
    assert float((found - exact).abs().max()) <= 1e-5


def test_scoring_and_training_passes_give_the_same_bits(tied_model: Path, ranks: Ranks) -> None:
    """Importance ratios begin at exactly 1: with and without a gradient the same products."""
    policy = build(tied_model, ranks)
    found: list[torch.Tensor] = []
    batches = policy.pack_update(ragged_sequences(16), list(range(16)), 4096, "sequence")
    policy.update(batches, supervised_loss)

    def noted(rows: Any) -> Any:
        found.append(rows.logprobs().detach().clone())
        return supervised_loss(rows)

    scored = policy.logprobs(batches)
    policy.update(batches, noted)
    assert len(scored) == len(found)
    assert all(torch.equal(one, other) for one, other in zip(scored, found, strict=True))


def test_reference_is_the_base_and_adapters_are_back_after_it(
    tied_model: Path, ranks: Ranks
) -> None:
    policy = build(tied_model, ranks)
    batches = policy.pack_update(ragged_sequences(6), list(range(6)), 300, "sequence")
    policy.score(batches)
    initial = [batch.columns["reference_logprob"].clone() for batch in batches]
    for _ in range(2):
        policy.update(batches, supervised_loss)
    policy.score(batches)
    for batch, first in zip(batches, initial, strict=True):
        assert torch.equal(batch.columns["reference_logprob"], first)
        assert (batch.columns["old_logprob"] - first).abs().max() > 1e-2
    assert policy._reference is not None
    assert policy._reference._waiting is None, "no second copy of the weights"


def test_only_adapters_have_gradients_and_optimizer_state(tied_model: Path, ranks: Ranks) -> None:
    policy = build(tied_model, ranks, ["q_proj", "down_proj"])
    trained(policy, updates=1)
    numbers = sum(tensor.numel() for tensor in policy.parameters.adapter_tensors().values())
    assert numbers == 4 * 4 * (64 + 64 + 96 + 64)
    assert numbers == trained_count(policy.architecture, policy.model_config.lora)
    [chunk] = policy.chunks
    learning = [parameter for parameter in chunk.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in learning) == numbers
    assert sum(buffer.numel for buffer in chunk.buffers) == numbers
    held: Any = policy.optimizer.megatron.chained_optimizers
    states = [
        tensor
        for part in held
        for state in part.optimizer.state.values()
        for tensor in state.values()
    ]
    assert sum(tensor.numel() for tensor in states if tensor.dim()) == 2 * numbers
    frozen = [parameter for parameter in chunk.parameters() if not parameter.requires_grad]
    assert all(
        parameter.grad is None and not hasattr(parameter, "main_grad") for parameter in frozen
    )


def test_recompute_gives_the_same_gradient(tied_model: Path, ranks: Ranks) -> None:
    gradients = []
    for megatron in ({}, RECOMPUTE):
        policy = build(tied_model, ranks, megatron=megatron)
        trained(policy, updates=1)
        gradients.append(dict(policy.named_gradients()))
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_resumed_policy_goes_on_bit_for_bit(
    tied_model: Path, ranks: Ranks, tmp_path: Path
) -> None:
    whole, first = build(tied_model, ranks), build(tied_model, ranks)
    trained(whole, updates=4)
    trained(first, updates=2)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), ranks)
    state = {"step": 2, "initial_model": first.initial_model}
    path = checkpoints.save(2, first.sharded_state(), state)
    resumed = build(tied_model, ranks)
    trained(resumed, updates=1)  # nothing may be left of it
    resumed.load_sharded_state(checkpoints.load(path, resumed.sharded_state(loading=True))[0])
    trained(resumed, updates=2)
    for ours, theirs in (
        (resumed.parameters.adapter_tensors(), whole.parameters.adapter_tensors()),
        (dict(resumed.named_weights()), dict(whole.named_weights())),
    ):
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_checkpoint_becomes_a_merged_folder_and_a_peft_one(
    tied_model: Path, ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = build(tied_model, ranks, ["q_proj", "v_proj", "up_proj"])
    trained(policy)
    state = {"step": 2, "initial_model": policy.initial_model}
    saved = Checkpoints(tmp_path / "run", CheckpointConfig(), ranks).save(
        2, policy.sharded_state(), state
    )
    convert.main(["megatron-to-hf", str(saved), str(tmp_path / "merged"), "--verify-bytes"])
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    said = capsys.readouterr().out
    assert said.endswith(f"\n{len(merged)} tensors merged anew: every byte is the same\n")
    for name, weight in policy.named_weights():
        assert float((merged[name] - weight).abs().max()) <= 1e-7, name
    ids = random_tokens(61, rows=2)
    architecture = Architecture.from_folder(tied_model)
    found = checkpoint_log_probs(architecture, saved, ids, ranks, policy.model_config.lora)
    assert float((found - log_probs(load(tmp_path / "merged"), ids)).abs().max()) <= 1e-5
    convert.main(["megatron-to-peft", str(saved), str(tmp_path / "converted")])
    assert f"{tmp_path / 'converted'}: written in " in capsys.readouterr().out
    policy.save_adapter(tmp_path / "adapter")
    one, other = (tmp_path / name for name in ("adapter", "converted"))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes()
    kept = load_file(one / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in kept.items() if ".layers.3." in name} == {
        f"{PREFIX}model.layers.3.self_attn.q_proj.lora_A.weight": (4, 64),
        f"{PREFIX}model.layers.3.self_attn.q_proj.lora_B.weight": (64, 4),
        f"{PREFIX}model.layers.3.self_attn.v_proj.lora_A.weight": (4, 64),
        f"{PREFIX}model.layers.3.self_attn.v_proj.lora_B.weight": (32, 4),
        f"{PREFIX}model.layers.3.mlp.up_proj.lora_A.weight": (4, 64),
        f"{PREFIX}model.layers.3.mlp.up_proj.lora_B.weight": (96, 4),
    }
    assert ("low-rank adapters of rank 4 beside q_proj, up_proj, v_proj") in "\n".join(
        inspect_checkpoint.describe(saved)
    )


def test_a_folder_of_bfloat16_is_what_megatron_makes_of_its_checkpoint(
    tied_model: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """The folder's sums are rounded, so Megatron's must be: apart from that the two differ by more
    than float32's rounding.
    """
    policy = build(tied_model, ranks, dtype="bfloat16")
    trained(policy)
    adapters = policy.parameters.adapter_tensors()
    assert all(tensor.any() for tensor in adapters.values()), "a B that is zero still"
    state = {"step": 2, "initial_model": policy.initial_model}
    saved = Checkpoints(tmp_path / "run", CheckpointConfig(), ranks).save(
        2, policy.sharded_state(), state
    )
    convert.megatron_to_hf(saved, tmp_path / "merged")
    ids = random_tokens(61)
    reference = Reference.of(load(tmp_path / "merged"), ids)
    lora = policy.model_config.lora
    merged = Architecture.from_folder(tmp_path / "merged")
    found = checkpoint_log_probs(merged, saved, ids, ranks, lora)
    reference.compare(found, "Megatron's")


def test_merging_takes_room_for_some_rows_alone() -> None:
    """And gives the sum in float64 of a weight of several chunks, rounded to its type."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1500, 4096, generator=generator).bfloat16()
    a, b = torch.randn(4, 4096, generator=generator), torch.randn(1500, 4, generator=generator)
    with Largest() as largest:
        merged = merge(weight, a, b, 0.5)
    assert largest.numbers == 2**22
    exact = weight.double() + 0.5 * b.double() @ a.double()
    assert merged.dtype == torch.bfloat16
    assert torch.allclose(merged.double(), exact, rtol=2.0**-8, atol=1e-6)


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest float32 tensor has that is made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs or {})
        if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
            self.numbers = max(self.numbers, made.numel())
        return made


def test_peft_loads_the_folder_with_the_same_logits(
    tied_model: Path, ranks: Ranks, tmp_path: Path
) -> None:
    peft = pytest.importorskip(
        "peft", reason="PEFT is not installed; the folder is compared with what it is, above"
    )
    policy = build(tied_model, ranks)
    batches = trained(policy)
    policy.save_adapter(tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(
        Qwen2ForCausalLM.from_pretrained(tied_model), tmp_path / "adapter"
    )
    found = torch.cat(policy.logprobs(batches))
    with torch.no_grad():
        theirs = [
            response_logprobs(model, ragged_sequences(9)[i])
            for batch in batches
            for i in batch.indices
        ]
    assert float((found - torch.cat(theirs)).abs().max()) <= 1e-5


def adapt_all_but_one(path: Path, ranks: Ranks) -> None:
    """Adapters for a model whose last layer has no down_proj, as far as is known."""
    model, parallel = ModelConfig(path=str(path)), ParallelConfig()
    architecture = Architecture.from_folder(path)
    config = transformer_config(model, architecture, parallel)
    [built] = build_models(config, architecture, parallel, False, ranks.device)
    mapping = WeightMapping(architecture)
    linears = linear_layers(built, mapping)
    del linears["decoder.layers.3.mlp.linear_fc2.weight"]
    adapt(built, linears, mapping, LoraConfig(targets=["q_proj", "down_proj"]))


def test_what_does_not_go_together_is_refused_by_key(
    tied_model: Path, ranks: Ranks, tmp_path: Path
) -> None:
    def refused(path: Path, parallel: ParallelConfig, **changes: Any) -> str:
        lora = LoraConfig(targets=changes.pop("targets", ALL))
        with pytest.raises(ConfigError) as caught:
            check_fit(ModelConfig(path=str(path), lora=lora, **changes), parallel)
        return str(caught.value)

    said = refused(tied_model, ParallelConfig(tensor=4))
    assert said.startswith(
        "model.lora.targets: q_proj, k_proj and v_proj have adapters on whole KV heads"
    )
    assert "with tensor 1 or 2 they would" in said
    check_fit(
        ModelConfig(path=str(tied_model), lora=LoraConfig(targets=["o_proj"])),
        ParallelConfig(tensor=4),
    )
    said = refused(tied_model, ParallelConfig(), layers="transformer_engine", dtype="bfloat16")
    assert said.startswith("model.lora: adapters stand beside Megatron's own linear layers")
    mixture = make_family_folder(tmp_path / "moe", "qwen3-moe")
    said = refused(mixture, ParallelConfig(), targets=["q_proj", "up_proj"])
    assert said.startswith("model.lora.targets: up_proj are the experts' in this model")
    assert said.endswith("name attention's projections alone: q_proj")
    said = refused(mixture, ParallelConfig(expert=2), targets=["q_proj"])
    assert said.startswith("parallel.expert: 2 ranks would share experts")
    with pytest.raises(
        ConfigError, match=r"^model\.lora\.targets: of a stage's 4 layers some have"
    ):
        adapt_all_but_one(tied_model, ranks)
    convert.hf_to_megatron(tied_model, tmp_path / "megatron")
    with pytest.raises(UserError, match="holds no low-rank adapters"):
        convert.megatron_to_peft(tmp_path / "megatron", tmp_path / "none")


def test_a_mixture_of_experts_trains_its_attention(ranks: Ranks, tmp_path: Path) -> None:
    path = make_family_folder(tmp_path / "moe", "qwen3-moe")
    policy = build(path, ranks, ["q_proj", "o_proj"], lr=1e-3)
    before = {name: weight.clone() for name, weight in policy.named_weights()}
    batches = policy.pack_update(ragged_sequences(6), list(range(6)), 300, "token")
    losses = [policy.update(batches, supervised_loss)["loss"] for _ in range(4)]
    assert losses[3] < losses[0]
    changed = {
        name for name, weight in policy.named_weights() if not torch.equal(weight, before[name])
    }
    assert changed == {name for name in before if name.endswith(("q_proj.weight", "o_proj.weight"))}
