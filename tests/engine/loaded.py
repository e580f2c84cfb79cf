"""Model folders as SGLang's own loaders read them on every rank; its interpreter runs this alone.

python tests/engine/loaded.py RANKS OUT FOLDER ...      OUT has FOLDER's name/rank/parameter
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from sglang.srt.configs.update_config import update_intermediate_size
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.runtime_context import get_parallel
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from transformers import AutoConfig

ALONE = SimpleNamespace(is_first_rank=True, is_last_rank=True, rank_in_group=0, world_size=1)


def load(folder: Path, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """A rank's parameters; the ranks need not exist at once, since loading is not communication."""
    mine = SimpleNamespace(rank_in_group=rank, world_size=ranks, cpu_group=None)
    seats = {f"{kind}_rank": rank for kind in ("tp", "attn_tp", "moe_tp")}
    seats |= {f"{kind}_size": ranks for kind in ("tp", "attn_tp", "moe_tp")}
    seats |= {"pp_rank": 0, "pp_size": 1, "moe_ep_rank": 0, "moe_ep_size": 1}
    groups = {
        "tp_group": mine,
        "attn_tp_group": mine,
        "moe_tp_group": mine,
        "moe_ep_group": ALONE,
        "pp_group": ALONE,
    }
    config = AutoConfig.from_pretrained(folder)
    # as a server on a CPU does, which widens other things too
    if hasattr(config, "moe_intermediate_size"):
        update_intermediate_size(
            SimpleNamespace(hf_config=config, hf_text_config=config),
            "moe_intermediate_size",
            32 * ranks,
        )
    kind, _ = ModelRegistry.resolve_model_cls(config.architectures)
    with get_parallel().override(**seats, **groups):
        model = kind(config)
        model.load_weights(load_file(folder / "model.safetensors").items())
    return {name: parameter.data for name, parameter in model.named_parameters()}


def main(ranks: int, out: str, *folders: str) -> None:
    arguments = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True}
    set_global_server_args_for_scheduler(
        ServerArgs(model_path=folders[0], tp_size=ranks, **arguments)
    )
    torch.set_default_dtype(torch.float32)
    found = {
        f"{Path(folder).name}/{rank}/{name}": tensor.contiguous()
        for folder in folders
        for rank in range(ranks)
        for name, tensor in load(Path(folder), rank, ranks).items()
    }
    save_file(found, out)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
