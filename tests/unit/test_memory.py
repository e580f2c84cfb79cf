"""The plan's formulas against what is really allocated: tensors of transformers, of the policy."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_efr.config import ConfigError, ParallelConfig
from megatron_efr.data.arithmetic import ArithmeticTask, write
from megatron_efr.memory import (
    BYTES,
    activation_bytes,
    attention_share,
    checkpoint_bytes,
    gradient_bytes,
    kv_bytes_per_token,
    largest_tensor_bytes,
    layer_activation_bytes,
    micro_batch_tokens,
    optimizer_bytes,
    parameter_count,
    stage_parameters,
)
from megatron_efr.planning.__main__ import main as plan_program
from megatron_efr.planning.shapes import shape_of
from megatron_efr.policy import Policy, supervised_loss
from megatron_efr.policy.ranks import Ranks
from megatron_efr.samples import PackedBatch, Sample
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.mapping import WeightMapping
from tests.conftest import ragged_sequences
from tests.families import make_family_folder
from tests.policies import make_policy

QWEN_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
    "max_position_embeddings": 131072,
}  # fmt: skip
MOE = {
    "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "head_dim": 16,
    "num_key_value_heads": 2, "intermediate_size": 96, "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2, "vocab_size": 61, "max_position_embeddings": 512,
}  # fmt: skip


def test_the_count_is_transformers_own_for_the_quickstart_model(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    write(tmp_path, 0, ArithmeticTask(train_rows=1, test_rows=1, sft_rows=1))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "model"))
    assert parameter_count(Architecture.from_folder(tmp_path / "model")) == sum(
        p.numel() for p in model.parameters()
    )


def test_the_count_of_the_7b_model_is_the_published_one() -> None:
    assert parameter_count(Architecture.from_config(QWEN_7B)) == 7_615_616_512


@pytest.mark.parametrize(
    ("raw", "tensor", "pipeline", "expert"),
    [
        (QWEN_7B, 2, 2, 1),
        (QWEN_7B | {"tie_word_embeddings": True}, 4, 2, 1),
        (QWEN_7B, 1, 1, 1),
        (MOE, 2, 2, 4),
    ],
)
def test_a_stages_count_is_that_of_the_shards_that_the_mapping_cuts(
    raw: dict[str, object], tensor: int, pipeline: int, expert: int
) -> None:
    """Cut for real, from tensors without storage, as loading cuts them."""
    a = Architecture.from_config(raw)
    mapping = WeightMapping(a, tensor, expert_ranks=expert)
    whole = {name: torch.empty(shape, device="meta") for name, shape in mapping.shapes().items()}
    stages = [0] * pipeline
    for name in mapping.parameters():
        if mapping.expert_rank(name) not in (None, 0):
            continue
        size = mapping.to_megatron(name, whole, 0).numel()
        layer = int(name.split(".")[2]) if name.startswith("decoder.layers.") else None
        at_end = name.startswith(("decoder.final", "output_layer"))
        stages[
            layer * pipeline // a.layers if layer is not None else pipeline - 1 if at_end else 0
        ] += size
        if a.tied and pipeline > 1 and name.startswith("embedding"):
            stages[-1] += size
    found = stage_parameters(a, ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert))
    assert [total for total, _ in found] == stages


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_gradients_and_optimizer_are_what_the_policy_holds(
    tied: bool, tied_model: Path, untied_model: Path, ranks: Ranks
) -> None:
    folder = tied_model if tied else untied_model
    architecture = Architecture.from_folder(folder)
    policy = make_policy(folder, ranks)
    [(count, experts)] = stage_parameters(architecture, ParallelConfig())
    assert experts == 0
    assert sum(p.numel() for chunk in policy.chunks for p in chunk.parameters()) == count
    sequences = ragged_sequences(4)
    policy.update(policy.pack_update(sequences, [0, 1, 2, 3], 400, "token"), supervised_loss)
    held = [t for chunk in policy.chunks for t in chunk.buffers[0].grad_data.untyped_storage()]
    assert len(held) == gradient_bytes(count)
    states = [
        tensor
        for part in policy.optimizer.megatron.chained_optimizers
        for state in part.optimizer.state.values()
        for tensor in state.values()
        if torch.is_tensor(tensor) and tensor.numel() > 1
    ]
    assert sum(t.numel() * t.element_size() for t in states) == optimizer_bytes(count, "float32")


def kept_by_autograd(policy: Policy, batches: list[PackedBatch]) -> int:
    """Bytes that an update keeps for its gradients, parameters left out."""
    parameters = {
        p.untyped_storage().data_ptr() for chunk in policy.chunks for p in chunk.parameters()
    }
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        policy.update(batches, supervised_loss)
    return sum(kept.values())


def beside_layers(architecture: Architecture, dtype: str) -> int:
    """Bytes that a token leaves beside the layers: the final norm's, the angles', the head's."""
    width, hidden = BYTES[dtype], architecture.hidden
    final_norm, angles, head = width * hidden + 4, 2 * width * architecture.head_dim, 4 * hidden
    return final_norm + angles + head


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2", "llama3", "qwen3", "qwen3-tied", "qwen3-moe"])
def test_activations_are_what_autograd_keeps(
    tmp_path: Path, ranks: Ranks, family: str, dtype: str
) -> None:
    """All that a model of local layers keeps, measured."""
    folder, tokens = make_family_folder(tmp_path / family, family), 512
    architecture = Architecture.from_folder(folder)
    policy = make_policy(folder, ranks, dtype=dtype)
    [sequence] = ragged_sequences(1, shortest=tokens, longest=tokens + 1)
    kept = kept_by_autograd(policy, policy.pack_update([sequence], [0], tokens, "token"))
    layers = activation_bytes(
        architecture, ParallelConfig(), dtype, tokens, recompute=False, local=True
    )
    beside = tokens * beside_layers(architecture, dtype)
    assert kept == pytest.approx(layers + beside, rel=0.03 if architecture.experts else 0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2", "llama3", "qwen3"])
def test_of_a_shared_prompt_attention_alone_keeps_each_sequences_tokens(
    tmp_path: Path, ranks: Ranks, family: str, dtype: str
) -> None:
    """Four sequences of 128 tokens, the first 100 of which are the same: 212 are laid, and
    attention keeps 300 more.
    """
    folder = make_family_folder(tmp_path / family, family)
    architecture = Architecture.from_folder(folder)
    policy = make_policy(folder, ranks, dtype=dtype)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 60, 100)
    drawn = [Sample(np.concatenate([prompt, rng.integers(0, 60, 28)]), 100) for _ in range(4)]
    [batch] = policy.pack_update(drawn, [0, 1, 2, 3], 1000, "token")
    laid, again = len(batch.tokens), 300
    assert laid == 212
    token = layer_activation_bytes(architecture, ParallelConfig(), dtype, local=True)
    share = attention_share(architecture, ParallelConfig(), dtype)
    layers = architecture.layers * token * (laid + share * again)
    kept = kept_by_autograd(policy, [batch])
    assert kept == pytest.approx(layers + laid * beside_layers(architecture, dtype), rel=0.03)


def test_recompute_keeps_each_layers_input_and_one_whole_layer() -> None:
    a = Architecture.from_config(QWEN_7B)
    parallel = ParallelConfig(tensor=2, sequence=True)
    whole = activation_bytes(a, parallel, "bfloat16", 1000, recompute=False)
    assert (
        activation_bytes(a, parallel, "bfloat16", 1000, recompute=True)
        == 28 * 1000 * 3584 + whole // 28
    )


def test_more_ranks_never_take_more(tmp_path: Path) -> None:
    a = Architecture.from_config(QWEN_7B)
    for one, two in itertools.pairwise(
        [ParallelConfig(tensor=t, sequence=t > 1) for t in (1, 2, 4)]
    ):
        assert (
            layer_activation_bytes(a, two, "bfloat16")
            == layer_activation_bytes(a, one, "bfloat16") / 2
        )
        assert max(stage_parameters(a, two)) < max(stage_parameters(a, one))
    assert optimizer_bytes(800, "bfloat16", 8) == 1200


def test_a_checkpoint_a_cached_token_and_the_largest_tensor_of_7b() -> None:
    a = Architecture.from_config(QWEN_7B)
    assert checkpoint_bytes(a, "bfloat16") == 14 * parameter_count(a)
    assert kv_bytes_per_token(a, 1, "bfloat16") == 2 * 28 * 4 * 128 * 2
    # 4 KV heads on 8 ranks: each twice
    assert kv_bytes_per_token(a, 8, "bfloat16") == 2 * 28 * 1 * 128 * 2
    assert largest_tensor_bytes(a, "bfloat16") == 152064 * 3584 * BYTES["bfloat16"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("DeepSeek-R1-Distill-Qwen-1.5B", 1_777_088_000),
        ("DeepSeek-R1-Distill-Qwen-7B", 7_615_616_512),
        ("DeepSeek-R1-Distill-Qwen-32B", 32_763_876_352),
        ("Qwen2.5-0.5B-Instruct", 494_032_768),
        ("SmolLM2-135M-Instruct", 134_515_008),
    ],
)
def test_published_shapes_have_the_published_counts(name: str, count: int) -> None:
    assert parameter_count(Architecture.from_config(shape_of(f"models/{name}"))) == count


def test_a_shape_is_read_from_a_config_alone_and_unknown_ones_are_refused(model_7b: Path) -> None:
    assert shape_of(str(model_7b)) == shape_of(str(model_7b / "config.json")) == QWEN_7B
    with pytest.raises(
        ConfigError, match=r"^model\.path: models/own: no model folder .* model\.path=FILE"
    ):
        shape_of("models/own")


@pytest.mark.parametrize(
    ("name", "on_gpu", "tokens"),
    [
        ("DeepSeek-R1-Distill-Qwen-7B", True, 16384),
        ("SmolLM2-135M-Instruct", False, 684),
        ("own", False, 16384),
    ],
)
def test_a_cpus_micro_batch_is_bounded_by_what_it_leaves_behind(
    name: str, on_gpu: bool, tokens: int
) -> None:
    small = QWEN_7B | {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "intermediate_size": 192,
        "num_attention_heads": 4,
    }
    a = Architecture.from_config(small if name == "own" else shape_of(f"models/{name}"))
    assert micro_batch_tokens(a, ParallelConfig(), "float32", on_gpu) == tokens
    kept = activation_bytes(a, ParallelConfig(), "float32", tokens, recompute=False, local=True)
    assert on_gpu or kept <= 768 * 2**20


@pytest.mark.parametrize("name", ["paper_1.5b", "paper_7b", "r1_32b_4nodes"])
def test_examples_are_planned_before_anything_is_downloaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    example = Path(__file__).parents[2] / "examples" / f"{name}.yaml"
    plan_program([str(example), "--nodes", "4" if "4nodes" in name else "1"])
    assert "KV cache of one engine" in capsys.readouterr().out


@pytest.fixture
def model_7b(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    return tmp_path


def test_the_plan_says_what_would_fit_and_it_does(model_7b: Path) -> None:
    from megatron_efr.planning.gpus import Case, remedies

    overrides = (f"model.path={model_7b}", "model.megatron={}", "parallel.ddp={}")
    example = str(Path(__file__).parents[2] / "examples/paper_7b.yaml")
    case = Case(example, overrides, world=8, gpu_bytes=80 * 2**30)
    over = [phase.name for phase in case.plan.phases if phase.total > case.gpu_bytes]
    assert over == ["train"], "33,024 tokens without recompute"
    choices = remedies(case)
    assert any("recompute" in override for choice in choices for override in choice)
    for choice in choices:
        assert case.and_also(choice).fits


def test_phases_hold_what_their_names_say(model_7b: Path) -> None:
    from megatron_efr.planning.gpus import Case

    example = str(Path(__file__).parents[2] / "examples/paper_7b.yaml")
    case = Case(example, (f"model.path={model_7b}",), world=8, gpu_bytes=80 * 2**30)
    phases = {phase.name: phase for phase in case.plan.phases}
    assert phases["rollout"].parts == phases["resume"].parts
    assert phases["offload"].total == phases["release"].total < phases["wake"].total
    static = phases["rollout"].parts["KV cache"] + phases["rollout"].parts["engine weights"]
    assert static == int(case.static_fraction * case.gpu_bytes)
    assert phases["publish"].total - phases["wake"].total == 2 * 512 * 2**20 + 2 * 152064 * 3584
    assert "KV cache" not in phases["train"].parts


def test_layers_with_adapters_are_planned_as_local_ones(model_7b: Path) -> None:
    from megatron_efr.planning.gpus import Case

    example = str(Path(__file__).parents[2] / "examples/paper_7b.yaml")
    case = Case(example, (f"model.path={model_7b}",), world=8, gpu_bytes=80 * 2**30)
    kept = [
        next(p.parts["activations"] for p in each.plan.phases if p.name == "train")
        for each in (
            case,
            case.and_also(["model.layers=local"]),
            case.and_also(["model.lora={}", "model.layers=auto"]),
        )
    ]
    assert kept[0] != kept[1] == kept[2]
