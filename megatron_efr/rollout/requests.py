"""What an engine is asked: refuses requests and ways of sampling that have no answer, before work starts."""

from __future__ import annotations

import math

from megatron_efr.errors import UserError
from megatron_efr.types import Request, Sampling
from megatron_efr.weights.architecture import Architecture


def check_sampling(sampling: Sampling, vocab: int) -> None:
    """Refuse, with a ValueError, a way of sampling that has no meaning for `vocab` tokens."""
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise ValueError(f"temperature: {sampling.temperature} is not a finite number >= 0 (0 is greedy)")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p: {sampling.top_p} is outside (0, 1]")
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: {sampling.max_new_tokens} leaves no room for a token")
    for token in sampling.stop_ids:
        if not 0 <= token < vocab:
            raise ValueError(f"stop_ids: {token} is outside the model's vocabulary of {vocab} tokens")


def check_servable(model: Architecture) -> None:
    """Refuse, with a UserError that names the engine that can, a model that SGLang's servers would decode otherwise."""
    if model.rotary.own_attention_factor:
        raise UserError(
            f"rollout.engine: SGLang does not read the attention_factor {model.rotary.attention_factor:g} that "
            f"config.json gives its YaRN, and would decode another model; set rollout.engine: local"
        )


def check_request(request: Request, sampling: Sampling, model: Architecture) -> None:
    """Refuse, with a ValueError that names the prompt, a request that `model` cannot answer."""
    prompt = request.prompt
    asked = len(prompt.tokens) + sampling.max_new_tokens
    if not prompt.tokens:
        raise ValueError(f"prompt {prompt.id}: it has no tokens")
    if asked > model.max_positions:
        raise ValueError(
            f"prompt {prompt.id}: {len(prompt.tokens)} tokens + max_new_tokens {sampling.max_new_tokens} = "
            f"{asked}, and the model has {model.max_positions} positions (max_position_embeddings)"
        )
    if not 0 <= min(prompt.tokens) <= max(prompt.tokens) < model.vocab:
        raise ValueError(f"prompt {prompt.id}: a token is outside the model's vocabulary of {model.vocab} tokens")
    if request.samples < 1:
        raise ValueError(f"prompt {prompt.id}: samples {request.samples}; at least 1 is needed")
    if not 0 <= request.seed < 2**64:
        raise ValueError(f"prompt {prompt.id}: seed {request.seed} is not an unsigned 64-bit number")
