"""Rotary frequencies, by the operations of transformers in their order: at far positions one bit of
them is visible.
"""

from __future__ import annotations

import math

import torch

from megatron_efr.weights.rotary import Rotary


def inverse_frequencies(rotary: Rotary, head_dim: int) -> torch.Tensor:
    """Radians that each pair of dimensions turns by from one position to the next, float32
    [head_dim / 2], on the CPU.

    Source: transformers' modeling_rope_utils; Llama 3's and YaRN's (Peng et al. 2023, section 3.2)
    interpolations.
    """
    base = rotary.theta ** (
        torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    )
    if rotary.kind == "linear":
        return 1.0 / base / rotary.factor
    if rotary.kind == "llama3":
        return _llama3(rotary, 1.0 / base)
    if rotary.kind == "yarn":
        return _yarn(rotary, base, head_dim)
    return 1.0 / base


def _llama3(rotary: Rotary, plain: torch.Tensor) -> torch.Tensor:
    low = rotary.low_freq_factor
    high = rotary.high_freq_factor
    turns = 2 * math.pi / plain
    scaled = torch.where(turns > rotary.original_positions / low, plain / rotary.factor, plain)
    smooth = (rotary.original_positions / turns - low) / (high - low)
    between = (1 - smooth) * scaled / rotary.factor + smooth * scaled
    outside = (turns < rotary.original_positions / high) | (turns > rotary.original_positions / low)
    return torch.where(outside, scaled, between)


def _yarn(rotary: Rotary, base: torch.Tensor, head_dim: int) -> torch.Tensor:
    low, high = (
        _dimension(rotary, turns, head_dim) for turns in (rotary.beta_fast, rotary.beta_slow)
    )
    if rotary.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp(
        (torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low), 0, 1
    )
    kept = 1 - ramp
    return 1.0 / (rotary.factor * base) * (1 - kept) + 1.0 / base * kept


def _dimension(rotary: Rotary, turns: float, head_dim: int) -> float:
    """The dimension, a fraction, that turns so often over the original positions."""
    return (
        head_dim
        * math.log(rotary.original_positions / (turns * 2 * math.pi))
        / (2 * math.log(rotary.theta))
    )
