"""Low-rank adapters as PEFT knows them: names, first values, and the folder that it loads. Needs no
Megatron.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megatron_efr.config import LoraConfig
from megatron_efr.durable import whole_folder
from megatron_efr.weights.folder import generator, save_tensors

PREFIX = "base_model.model."  # PEFT's, before a module's name in Hugging Face's model
ALPHA = "lora_alpha"  # beside the tensors in a checkpoint, float64 [1]
_NUMBERS = 2**22  # of a weight that are merged at once


def tensor_names(module: str) -> tuple[str, str]:
    """The names of A and B of a projection, `model.layers.0.self_attn.q_proj` for instance, as
    PEFT's files have it.
    """
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def drawn(seed: int, name: str, shape: tuple[int, int]) -> torch.Tensor:
    """A first A [rank, in] as PEFT draws it (Kaiming's uniform, a = sqrt 5): a function of (seed,
    name).
    """
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator(seed, name))


def merge(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """weight [out, in] + scaling * b [out, rank] @ a [rank, in], computed in float32, in the
    weight's type.

    Some rows at a time: beside the result there are 32 MiB in float32 at most, and a.
    """
    merged = torch.empty_like(weight, memory_format=torch.contiguous_format)
    rows, a = max(1, _NUMBERS // weight.shape[1]), a.float()
    for into, part, b_part in zip(
        merged.split(rows), weight.split(rows), b.split(rows), strict=True
    ):
        into.copy_(torch.addmm(part.float(), b_part.float(), a, alpha=scaling))
    return merged


def shape_of_adapters(sizes: Mapping[str, Sequence[int]]) -> tuple[int, list[str]] | None:
    """(rank, targets) of the adapters among a checkpoint's tensors of these sizes; None if there
    are none.
    """
    ends = ".lora_A.weight"
    found = {
        name: size
        for name, size in sizes.items()
        if name.startswith(PREFIX) and name.endswith(ends)
    }
    if not found:
        return None
    targets = sorted({name.removesuffix(ends).rpartition(".")[2] for name in found})
    return next(iter(found.values()))[0], targets


def save_adapter(
    destination: str | Path,
    tensors: Mapping[str, torch.Tensor],
    config: LoraConfig,
    base: str | Path,
) -> None:
    """Write whole adapter tensors as a folder that `peft.PeftModel.from_pretrained` loads onto the
    model at `base`.

    Complete or absent: it is built beside its place and moved there.
    """
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": list(config.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with whole_folder(Path(destination)) as partial:
        (partial / "adapter_config.json").write_text(
            json.dumps(described, indent=2) + "\n", encoding="utf-8"
        )
        kept = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        save_tensors(kept, partial / "adapter_model.safetensors")
