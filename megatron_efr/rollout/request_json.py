"""Requests as JSON: prompts, and whole requests with their scripts and notes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from megatron_efr import scripts
from megatron_efr.types import Prompt, Request, Script


def encode_request(request: Request) -> dict[str, Any]:
    """The request as plain values; its prompt's `meta` and its note must be JSON-ready."""
    return {
        "prompt": encode_prompt(request.prompt),
        "seed": request.seed,
        "scripts": encode_scripts(request.scripts),
        "note": dict(request.note),
    }


def decode_request(tree: Mapping[str, Any]) -> Request:
    """The request that `encode_request` wrote."""
    return Request(
        decode_prompt(tree["prompt"]), tree["seed"], decode_scripts(tree["scripts"]), tree["note"]
    )


def encode_prompt(prompt: Prompt) -> dict[str, Any]:
    """The prompt as plain values; `meta` must be JSON-ready."""
    return {
        "id": prompt.id,
        "tokens": list(prompt.tokens),
        "text": prompt.text,
        "gold": prompt.gold,
        "meta": dict(prompt.meta),
    }


def decode_prompt(tree: Mapping[str, Any]) -> Prompt:
    """The prompt that `encode_prompt` wrote."""
    return Prompt(**{**tree, "tokens": tuple(tree["tokens"])})


def encode_scripts(asked: Iterable[Script]) -> list[Any]:
    """Scripts by name, each with how many samples in a row have it."""
    return [[len(list(same)), scripts.encode(script)] for script, same in groupby(asked)]


def decode_scripts(tree: Sequence[Any]) -> tuple[Script, ...]:
    """The scripts that `encode_scripts` wrote, one for each sample."""
    return tuple(script for count, options in tree for script in [scripts.decode(options)] * count)
