"""Conversion between Hugging Face folders and Megatron checkpoints: exact, in Megatron's own form,
in little memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.utils import unwrap_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_efr import convert, inspect_checkpoint
from megatron_efr.checkpoint.checkpoints import Checkpoints
from megatron_efr.checkpoint.manifest import CheckpointError, verify
from megatron_efr.checkpoint.torch_dist import COMMON
from megatron_efr.config import (
    CheckpointConfig,
    ConfigError,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
)
from megatron_efr.errors import UserError
from megatron_efr.policy import Policy, Ranks
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import FolderWeights
from tests.families import FAMILIES, make_family_folder

ROOT = Path(__file__).parents[2]


def build(path: Path, ranks: Ranks, **model: Any) -> Policy:
    config = ModelConfig(path=str(path), **model)
    return Policy(config, ParallelConfig(), OptimizerConfig(lr=1e-3), ranks, updates=1, seed=0)


def same(tensors: int) -> str:
    return f"{tensors} tensors converted both ways: every byte is the same"


def layout(checkpoint: Path) -> dict[str, Any]:
    """Every tensor's shape, type and chunks, and every other object's name, as torch's metadata has
    them.
    """
    stored = torch_checkpoint.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return {
        key: (
            tuple(value.size),
            value.properties,
            sorted((tuple(c.offsets), tuple(c.sizes)) for c in value.chunks),
        )
        if isinstance(value, torch_checkpoint.TensorStorageMetadata)
        else None
        for key, value in stored.items()
        if not key.startswith("optimizer.")
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_exact_to_the_bit(family: str, dtype: str, tmp_path: Path) -> None:
    path = make_family_folder(tmp_path / "model", family, dtype=getattr(torch, dtype))
    convert.hf_to_megatron(path, tmp_path / "megatron")
    convert.megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (path, tmp_path / "back")
    )
    if Architecture.from_folder(path).tied:
        before.pop("lm_head.weight", None)
    assert before.keys() == after.keys()
    assert all(
        before[name].dtype == after[name].dtype and torch.equal(before[name], after[name])
        for name in before
    )
    assert (path / "config.json").read_bytes() == (tmp_path / "back" / "config.json").read_bytes()
    assert convert.compare_bytes(path, tmp_path / "megatron") == same(len(after))
    tokens = torch.arange(40)[None] % 61
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(p)(tokens).logits
            for p in (path, tmp_path / "back")
        ]
    assert torch.equal(*logits)
    verify(tmp_path / "megatron")


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_is_what_one_process_saves(family: str, ranks: Ranks, tmp_path: Path) -> None:
    path = make_family_folder(tmp_path / "model", family)
    convert.hf_to_megatron(path, tmp_path / "megatron")
    policy = build(path, ranks)
    saved = Checkpoints(tmp_path / "run", CheckpointConfig(keep=1), ranks).save(
        1, policy.sharded_state(), {"step": 1}
    )
    # up to 0.16 Megatron has a file for it
    assert layout(tmp_path / "megatron") == layout(saved) | {COMMON: None}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_policy_loads_what_was_converted(
    family: str, dtype: str, ranks: Ranks, tmp_path: Path
) -> None:
    path = make_family_folder(tmp_path / "model", family, dtype=getattr(torch, dtype))
    convert.hf_to_megatron(path, tmp_path / "megatron")
    policy = build(path, ranks, init="random", dtype=dtype)
    model: Any = unwrap_model(policy.chunks[0])
    loaded, state = Checkpoints(tmp_path, CheckpointConfig(keep=1), ranks).load(
        tmp_path / "megatron", {"model0": model.sharded_state_dict()}
    )
    model.load_state_dict(loaded["model0"])
    source = FolderWeights(path, Architecture.from_folder(path))
    assert all(torch.equal(tensor, source[name]) for name, tensor in policy.named_weights())
    assert state["initial_model"]["sha256"] == build(path, ranks).initial_model["sha256"]


@pytest.mark.parametrize("family", ["qwen2", "qwen3-moe"])
def test_a_run_s_checkpoint_becomes_a_folder(family: str, ranks: Ranks, tmp_path: Path) -> None:
    """Trained in float32 from a bfloat16 model: the result is float32, and says so if transformers
    looks.
    """
    path = make_family_folder(tmp_path / "model", family, dtype=torch.bfloat16)
    policy = build(path, ranks)
    with torch.no_grad():
        for parameter in policy.chunks[0].parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    state = {"step": 3, "initial_model": policy.initial_model}
    saved = Checkpoints(tmp_path / "run", CheckpointConfig(keep=1), ranks).save(
        3, policy.sharded_state(), state
    )
    convert.megatron_to_hf(saved, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    weights = dict(policy.named_weights())
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in after)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    lines = "\n".join(inspect_checkpoint.describe(saved))
    assert lines.startswith("step 3, from ")
    assert "decoder.layers.self_attention.linear_qkv.weight" in lines
    assert f"[2, {128 if family == 'qwen2' else 256}, 64]" in lines


def test_several_files_when_it_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_family_folder(tmp_path / "model", "llama")
    convert.hf_to_megatron(path, tmp_path / "megatron")
    monkeypatch.setattr(convert, "SHARD_BYTES", 40_000)
    convert.megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    found = convert.compare_bytes(tmp_path / "back", tmp_path / "megatron")
    assert found == same(len(index["weight_map"]))


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    path = make_family_folder(tmp_path / "model", "llama")
    with pytest.raises(ConfigError, match=r"model: no checkpoint: no \.metadata there"):
        convert.torch_dist.CheckpointWeights(path, Architecture.from_folder(path))
    convert.hf_to_megatron(path, tmp_path / "megatron")
    with pytest.raises(UserError, match="megatron: exists already; name another, or remove it"):
        convert.hf_to_megatron(path, tmp_path / "megatron")
    other = make_family_folder(tmp_path / "other", "llama", intermediate_size=128)
    with pytest.raises(
        ConfigError,
        match=r"linear_fc1\.weight is \(2, 192, 64\), config\.json makes it \(2, 256, 64\)",
    ):
        convert.megatron_to_hf(tmp_path / "megatron", tmp_path / "out", template=other)
    qwen = make_family_folder(tmp_path / "qwen", "qwen3", head_dim=16)
    with pytest.raises(
        ConfigError, match=r"no tensor decoder\.layers\.self_attention\.q_layernorm\.weight"
    ):
        convert.megatron_to_hf(tmp_path / "megatron", tmp_path / "out", template=qwen)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"decoder\.layers\.1\.mlp\.linear_fc1\.weight is not what .*model holds in"
    ):
        convert.compare_bytes(path, tmp_path / "megatron")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"model\.norm\.weight is stored as I8; supported: F32, BF16, F16"
    ):
        convert.hf_to_megatron(path, tmp_path / "again")
    data = tmp_path / "megatron" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: \d+ bytes, \d+ were written"):
        convert.megatron_to_hf(tmp_path / "megatron", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def efr(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "megatron_efr.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.heavy
def test_commands(tmp_path: Path) -> None:
    path = make_family_folder(tmp_path / "model", "llama3", dtype=torch.bfloat16)
    done = efr("convert", "hf-to-megatron", path, tmp_path / "megatron", "--verify")
    assert done.returncode == 0, done.stderr
    assert "21 tensors converted both ways: every byte is the same" in done.stdout
    assert "Megatron's log-probs of random tokens are " in done.stdout
    done = efr("convert", "megatron-to-hf", tmp_path / "megatron", tmp_path / "back", "--verify")
    assert done.returncode == 0, done.stderr
    assert "Megatron's log-probs of random tokens are " in done.stdout
    done = efr("inspect", tmp_path / "megatron")
    assert done.returncode == 0, done.stderr
    assert "step 0, from" in done.stdout
    assert "verified: " in done.stdout
    state = tmp_path / "megatron" / "state.json"
    longer = state.write_text(state.read_text() + "\n")
    done = efr("inspect", tmp_path / "megatron")
    assert done.returncode == 2
    assert "error: does not verify: " in done.stderr
    assert f"state.json: {longer} bytes" in done.stderr


def test_of_a_run_the_checkpoint_that_is_written_is_verified(
    tmp_path: Path, tied_model: Path
) -> None:
    step = tmp_path / "run/checkpoints/step_000000"
    step.parent.mkdir(parents=True)
    convert.hf_to_megatron(tied_model, step)
    (step.parent / "latest").write_text(step.name)
    convert.main(
        ["megatron-to-hf", str(tmp_path / "run"), str(tmp_path / "back"), "--verify-bytes"]
    )
    wanted = len(FolderWeights(tied_model, Architecture.from_folder(tied_model)).shapes)
    assert convert.compare_bytes(tmp_path / "back", step) == same(wanted)


def test_conversion_imports_neither_megatron_nor_triton() -> None:
    code = (
        "import sys, megatron_efr.convert, megatron_efr.inspect_checkpoint;print([m for m in "
        "sys.modules if m.split('.')[0] in ('megatron', 'triton', 'transformers')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.strip() == "[]", done.stderr


_MEASURED = """
import resource, sys
from pathlib import Path
from megatron_efr import convert
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
getattr(convert, sys.argv[1])(Path(sys.argv[2]), Path(sys.argv[3]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""


@pytest.mark.slow
def test_six_gigabytes_within_two(tmp_path: Path) -> None:
    """A model of 6 GB in bfloat16 goes both ways, and is compared, in less than 2 GiB above what
    the imports take.
    """
    path = _large_folder(tmp_path / "model")
    assert 5.8e9 < sum(file.stat().st_size for file in path.glob("*.safetensors")) < 6.5e9
    for step, source, destination in [
        ("hf_to_megatron", path, tmp_path / "megatron"),
        ("compare_bytes", path, tmp_path / "megatron"),
        ("megatron_to_hf", tmp_path / "megatron", tmp_path / "back"),
        ("compare_bytes", tmp_path / "back", tmp_path / "megatron"),
    ]:
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", _MEASURED, step, str(source), str(destination)],
            cwd=ROOT, capture_output=True, text=True, timeout=1800,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        peak = float(done.stdout)
        print(f"{step}: {peak:.2f} GiB above the imports, {time.perf_counter() - began:.0f} s")
        assert peak < 2.0, step


_VERIFIED = """
import sys
from pathlib import Path
import megatron_efr.policy.forward, transformers.models.qwen2.modeling_qwen2
from megatron_efr import convert

def peak():  # of this program alone: ru_maxrss has what its parent held when it was started
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
print(convert.compare_logits(Path(sys.argv[1]), Path(sys.argv[2])))
print((peak() - before) * 2**10)
"""


@pytest.mark.slow
def test_verification_holds_two_and_a_half_times_the_weights(tmp_path: Path) -> None:
    """Of a model of 0.4 GB with a third of it in the embedding, in a process of its own, above what
    imports take.
    """
    path = make_family_folder(
        tmp_path / "model", "qwen2", vocab_size=40_000, hidden_size=896, intermediate_size=4864,
        num_hidden_layers=4, num_attention_heads=14, initializer_range=0.02,
    )  # fmt: skip
    weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    convert.hf_to_megatron(path, tmp_path / "megatron")
    done = subprocess.run(
        [sys.executable, "-c", _VERIFIED, str(path), str(tmp_path / "megatron")],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *_, said, peak = done.stdout.splitlines()
    print(
        f"{said}; {weights / 2**20:.0f} MiB of weights, {float(peak) / weights:.2f} times that "
        "above the imports"
    )
    assert 3e8 < weights < 5e8
    assert float(peak) < 2.5 * weights


def _large_folder(folder: Path) -> Path:
    """A Llama of 3 billion parameters: 26 layers of 3,072, 24 heads, a vocabulary of 64,000,
    untied.
    """
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=64000, hidden_size=3072, intermediate_size=8192, num_hidden_layers=26,
        num_attention_heads=24,
        num_key_value_heads=8, max_position_embeddings=8192, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    shapes = convert.torch_dist.WeightMapping(Architecture.from_folder(folder)).shapes()
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(
            name.split(".layers.")[-1].split(".")[0] if ".layers." in name else name, []
        ).append(name)
    index = {}
    for number, names in enumerate(groups.values()):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        save_file(
            {name: torch.randn(shapes[name], dtype=torch.bfloat16) for name in names},
            folder / file,
            metadata={"format": "pt"},
        )
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder
