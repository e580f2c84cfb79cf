"""Bytes that an embedded engine takes on this CPU: its weights in the form of their products, and
its cache.
"""

from __future__ import annotations

import torch

from megatron_efr.memory import BYTES, kv_bytes_per_token, parameter_count
from megatron_efr.rollout.local.decoder import KEYS, round_up
from megatron_efr.rollout.local.products import Form
from megatron_efr.weights.architecture import Architecture


def form_of(architecture: Architecture, dtype: str) -> Form:
    """The form of the layers' weights."""
    return Form(architecture.hidden, torch.device("cpu"), getattr(torch, dtype))


def weight_bytes(architecture: Architecture, dtype: str) -> int:
    """The embedding as it is, and the layers and the head in the form of their products; a head
    that is the embedding itself takes nothing.
    """
    a, form = architecture, form_of(architecture, dtype)
    of_head = Form(a.hidden, form.device, form.dtype, head=True)
    embedding = a.vocab * a.hidden
    layers = parameter_count(a) - embedding * (1 if a.tied else 2)
    shared = a.tied and of_head.packed is None and of_head.dtype == form.dtype
    head = 0 if shared else embedding * of_head.held.itemsize
    return layers * form.held.itemsize + embedding * BYTES[dtype] + head


def token_bytes(architecture: Architecture, dtype: str) -> int:
    """Keys and values of one token, in the type in which attention works."""
    held = str(form_of(architecture, dtype).held).removeprefix("torch.")
    return kv_bytes_per_token(architecture, 1, held)


def cache_bytes(architecture: Architecture, dtype: str, rows: int, tokens: int) -> int:
    """The cache of so many rows of so many tokens each, in the blocks in which it grows."""
    rows = round_up(rows, form_of(architecture, dtype).rows)
    return rows * round_up(tokens, KEYS) * token_bytes(architecture, dtype)
