"""The Megatron model alone, without gradients and optimizer: log-probs in one copy of the
weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing

from megatron_efr.config import LoraConfig, ModelConfig, ParallelConfig
from megatron_efr.kernels import choose_backend
from megatron_efr.policy.divisibility import te_layers
from megatron_efr.policy.head import build_head
from megatron_efr.policy.layers import packed_sequences
from megatron_efr.policy.lora import Adapters
from megatron_efr.policy.model import (
    PolicyModel,
    build_models,
    canonical_parameters,
    transformer_config,
)
from megatron_efr.policy.packing import pack
from megatron_efr.policy.ranks import Ranks
from megatron_efr.samples import Sample
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.lora import merge, tensor_names
from megatron_efr.weights.mapping import WeightMapping


@torch.no_grad()
def checkpoint_log_probs(
    architecture: Architecture,
    checkpoint: Path,
    ids: list[list[int]],
    ranks: Ranks,
    lora: LoraConfig | None = None,
) -> torch.Tensor:
    """Log-probs float32 [rows, length - 1] of each row's tokens but the first, in one process.

    The model has `architecture`; its weights are the Megatron checkpoint's, read by Megatron's own
    loader, and so are the adapters beside them if there are any, `lora`: these are merged.
    """
    # the model as a checkpoint has it, in one process
    model = ModelConfig(path=str(checkpoint), lora=lora)
    parallel = ParallelConfig()
    config = transformer_config(model, architecture, parallel)
    [built] = build_models(
        config, architecture, parallel, te_layers(model), ranks.device, model.lora
    )
    # its weights, with the adapters in them: the one model that a folder holds
    loaded: Any = dist_checkpointing.load({"model0": built.sharded_state_dict()}, str(checkpoint))
    built.load_state_dict(loaded["model0"])
    del loaded  # a second copy, which the model does not need any more
    if built.adapters is not None:
        _merge(built, built.adapters, WeightMapping(architecture), checkpoint)
    built.eval()
    # the head, and one row at a time through both
    backend, _ = choose_backend(model.kernels)
    head = build_head(built, architecture.vocab, model.head_chunk_tokens, ranks, 1.0, backend)
    assert head is not None  # of one pipeline stage
    found = []
    for row in ids:
        batch = pack([Sample(np.array(row, np.int32), 1)], [0], {0: 1.0}, ranks.device)
        hidden = built(
            input_ids=batch.tokens[None],
            position_ids=batch.positions[None],
            attention_mask=None,
            packed_seq_params=packed_sequences(batch.lengths, batch.cu_seqlens),
        )
        found.append(head.rows(hidden, batch, 1.0).logprobs().cpu())
    return torch.stack(found)


def _merge(
    model: PolicyModel, adapters: Adapters, mapping: WeightMapping, checkpoint: Path
) -> None:
    """Add the adapters to the weights and turn them off, so that the weights are a folder's, bit
    for bit: each projection's sum, rounded to the type that the checkpoint stores.
    """
    stored: Any = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    parameters = canonical_parameters(model, mapping)
    for weight, adapter in adapters.by_weight().items():
        shards = dict(adapter.shards())
        merged = {}
        for name, tensor in mapping.to_hugging_face(weight, [parameters[weight]]):
            a, b = tensor_names(name.removesuffix(".weight"))
            if a in shards:
                rounded = tensor.to(stored[a].dtype)
                tensor = merge(rounded, shards[a].tensor, shards[b].tensor, adapter.scaling)
            merged[name] = tensor
        parameters[weight].copy_(mapping.to_megatron(weight, merged, 0))
    adapters.on = False
