"""Splits that a model's weights divide over; the refusal names the key and what would fit."""

from __future__ import annotations

import math

from megatron_efr.config import ConfigError
from megatron_efr.weights.architecture import Architecture


def check_split(architecture: Architecture, tensor: int, expert: int) -> None:
    """ConfigError if the weights do not divide over these ranks; a vocabulary is padded until it
    does.
    """
    # attention heads
    heads, kv_heads = architecture.heads, architecture.kv_heads
    if heads % tensor:
        raise ConfigError(
            f"parallel.tensor: {heads} attention heads do not divide over {tensor} ranks; "
            f"{divisors(heads)} would fit"
        )
    # more ranks than key-value heads is fine: several ranks then hold the same head
    if kv_heads % tensor and tensor % kv_heads:
        fitting = [
            t
            for t in range(1, heads + 1)
            if heads % t == 0 and (kv_heads % t == 0 or t % kv_heads == 0)
        ]
        raise ConfigError(
            f"parallel.tensor: {kv_heads} key-value heads neither divide over {tensor} ranks nor "
            f"divide {tensor}; {_either(fitting)} would fit"
        )
    # rows that are cut column-wise
    ffn = architecture.experts.ffn if architecture.experts else architecture.ffn
    qkv = (heads + 2 * kv_heads) * architecture.head_dim
    for rows, what in (
        (ffn, "the feed-forward width"),
        (qkv, "the rows of queries, keys and values together,"),
    ):
        if rows % tensor:
            raise ConfigError(
                f"parallel.tensor: {what} {rows} does not divide over {tensor} ranks; "
                f"{divisors(math.gcd(rows, heads))} would fit"
            )
    # experts
    experts = architecture.experts.count if architecture.experts else 0
    if expert > 1 and not experts:
        raise ConfigError(
            f"parallel.expert: {expert} ranks are to share experts, and the model has none; set "
            "it to 1"
        )
    if experts % expert:
        raise ConfigError(
            f"parallel.expert: {experts} experts do not divide over {expert} ranks; "
            f"{divisors(experts)} would fit"
        )


def divisors(number: int) -> str:
    """The divisors of `number` in words."""
    return _either([d for d in range(1, number + 1) if number % d == 0])


def _either(choices: list[int]) -> str:
    return (
        str(choices[0])
        if len(choices) == 1
        else f"{', '.join(map(str, choices[:-1][:7]))} or {choices[-1]}"
    )
