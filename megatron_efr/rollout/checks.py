"""Refuses requests and ways of sampling that have no answer, before work starts."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel

from megatron_efr.config import ConfigError
from megatron_efr.errors import UserError
from megatron_efr.rollout.codec import Codec
from megatron_efr.types import Request, Sampling, Script
from megatron_efr.weights.architecture import Architecture


def check_sampling(sampling: Sampling, vocab: int) -> None:
    """Refuse, with a ValueError, a way of sampling that has no meaning for `vocab` tokens."""
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise ValueError(
            f"temperature: {sampling.temperature} is not a finite number >= 0 (0 is greedy)"
        )
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p: {sampling.top_p} is outside (0, 1]")
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: {sampling.max_new_tokens} leaves no room for a token")
    for token in sampling.stop_ids:
        if not 0 <= token < vocab:
            raise ValueError(
                f"stop_ids: {token} is outside the model's vocabulary of {vocab} tokens"
            )


def check_servable(model: Architecture) -> None:
    """Refuse, with a UserError that names the engine that can, a model that SGLang's servers would
    decode otherwise.
    """
    if model.rotary.own_attention_factor:
        raise UserError(
            "rollout.engine: SGLang does not read the attention_factor "
            f"{model.rotary.attention_factor:g} that config.json gives its YaRN, and would decode "
            "another model; set rollout.engine: local"
        )


def longest(script: Script, max_new_tokens: int, codec: Codec) -> int:
    """The tokens that a response of `script` has at most, drawn and written, and those of its
    longest branch.
    """
    longest = max_new_tokens + sum(len(codec.encode(text)) for text in script.forced)
    if script.branches is None:
        return longest
    opening, drawn = script.branches
    return longest + len(codec.encode(opening)) + drawn


def check_script(script: Script, codec: Codec, path: str) -> None:
    """Refuse, with a ConfigError that names the key within `path`, a text that the tokenizer cannot
    serve a script as.

    A draw ends at single tokens alone: engines then draw the same, and nothing that was drawn is
    cut in two.
    """
    for text in script.until:
        if len(tokens := codec.encode(text)) != 1:
            raise ConfigError(
                f"{_key(script, text, path)}: {text!r} is {len(tokens)} tokens of this model's "
                "tokenizer, and a draw can end only before a text that is a single one; name one "
                "of the tokenizer's own tokens"
            )
    for text in script.penalised:
        if len(tokens := codec.encode(text)) != 1:
            raise ConfigError(
                f"{_key(script, text, path)}: {text!r} is {len(tokens)} tokens of this model's "
                "tokenizer, and only a single one can be penalised; name one of the tokenizer's "
                "own tokens"
            )
    if script.until_any and not any(len(codec.encode(text)) == 1 for text in script.until_any):
        raise ConfigError(
            f"{_key(script, script.until_any[0], path)}: none of "
            f"{', '.join(map(repr, script.until_any))} is a single token of this model's "
            "tokenizer, and a draw can end only before one; name some of the tokenizer's own"
        )
    for text in (*script.forced, *(script.branches or ())[:1]):
        if text and not codec.encode(text):
            raise ConfigError(
                f"{_key(script, text, path)}: {text!r} is no token of this model's tokenizer"
            )


def check_request(request: Request, sampling: Sampling, model: Architecture, codec: Codec) -> int:
    """The tokens that prompt and response have at most. ValueError names the prompt of a request
    that `model` cannot answer.
    """
    prompt = request.prompt
    if not prompt.tokens:
        raise ValueError(f"prompt {prompt.id}: it has no tokens")
    if request.samples < 1:
        raise ValueError(f"prompt {prompt.id}: samples {request.samples}; at least 1 is needed")
    for script in set(request.scripts):
        check_script(script, codec, f"prompt {prompt.id}: script")
    written = max(longest(script, 0, codec) for script in set(request.scripts))
    asked = len(prompt.tokens) + sampling.max_new_tokens + written
    if asked > model.max_positions:
        raise ValueError(
            f"prompt {prompt.id}: {len(prompt.tokens)} tokens + max_new_tokens "
            f"{sampling.max_new_tokens}{f' + {written} of its script' if written else ''} = "
            f"{asked}, and the model has {model.max_positions} positions (max_position_embeddings)"
        )
    if not 0 <= min(prompt.tokens) <= max(prompt.tokens) < model.vocab:
        raise ValueError(
            f"prompt {prompt.id}: a token is outside the model's vocabulary of {model.vocab} tokens"
        )
    if not 0 <= request.seed < 2**64:
        raise ValueError(
            f"prompt {prompt.id}: seed {request.seed} is not an unsigned 64-bit number"
        )
    return asked


def _key(script: Script, text: str, path: str) -> str:
    """The path of the option of `script` that has `text`."""
    options: dict[str, Any] = dict(script) if isinstance(script, BaseModel) else {}
    for name, value in options.items():
        if value == text or (isinstance(value, tuple) and text in value):
            return f"{path}.{name}"
    return path
