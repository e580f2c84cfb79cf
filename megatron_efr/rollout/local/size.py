"""Bytes that an embedded engine takes on this CPU: its weights in the form of their products, and
its cache.
"""

from __future__ import annotations

import math

import torch

from megatron_efr.rollout.local.decoder import KEYS, round_up
from megatron_efr.rollout.local.products import Form
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.mapping import WeightMapping

CPU = torch.device("cpu")


def weight_bytes(architecture: Architecture, dtype: torch.dtype) -> int:
    """The embedding as it is, the layers in the form of their products, and the head in float32,
    unless that is the embedding itself.
    """
    a, form = architecture, Form(architecture.hidden, CPU, dtype)
    embedding = a.vocab * a.hidden
    all_weights = sum(math.prod(shape) for shape in WeightMapping(a).shapes().values())
    layers = all_weights - embedding * (1 if a.tied else 2)
    shared = a.tied and form.packed is None and dtype == torch.float32
    head = 0 if shared else embedding * torch.float32.itemsize
    return layers * form.held.itemsize + embedding * dtype.itemsize + head


def token_bytes(architecture: Architecture, dtype: torch.dtype) -> int:
    """Keys and values of one token."""
    a, form = architecture, Form(architecture.hidden, CPU, dtype)
    return 2 * a.layers * a.kv_heads * a.head_dim * form.held.itemsize


def cache_bytes(architecture: Architecture, dtype: torch.dtype, rows: int, tokens: int) -> int:
    """The cache of so many rows of so many tokens each, in the blocks in which it grows."""
    rows = round_up(rows, Form(architecture.hidden, CPU, dtype).rows)
    return rows * round_up(tokens, KEYS) * token_bytes(architecture, dtype)
