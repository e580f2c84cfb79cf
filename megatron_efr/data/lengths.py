"""Holds prompts and responses against the positions that a model has, before work starts."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_efr.data.prompts import PromptError
from megatron_efr.types import Prompt


def check_prompts(prompts: Sequence[Prompt], max_new_tokens: int, positions: int, key: str) -> None:
    """PromptError if a prompt and `max_new_tokens` more tokens are over `positions`; it says what
    would fit.

    `key` is the configuration's name of that limit.
    """
    longest = max(prompts, key=lambda prompt: len(prompt.tokens))
    where = longest.meta.get("where", longest.id)
    length = len(longest.tokens)
    if length + max_new_tokens <= positions:
        return
    fits = []
    if length < positions:
        fits.append(f"{key} of at most {positions - length}")
    if (room := positions - max_new_tokens) >= min(len(prompt.tokens) for prompt in prompts):
        over = sum(len(prompt.tokens) > room for prompt in prompts)
        fits.append(
            f"prompt.max_tokens of at most {room}, which leaves out {over} of {len(prompts)} "
            "prompts"
        )
    raise PromptError(
        f"{key}: {max_new_tokens} tokens after the longest prompt, of {length} ({where}), come to "
        f"{length + max_new_tokens}, and the model has {positions} positions "
        "(max_position_embeddings in its config.json). What would fit: "
        f"{', or '.join(fits) or f'prompts of fewer than {positions} tokens'}"
    )


def check_rows(lengths: Sequence[int], places: Sequence[str], positions: int) -> None:
    """PromptError if rows of prompt and response are longer than `positions`; it counts them and
    names the longest.

    `places` are the rows' "file:line".
    """
    over = sum(length > positions for length in lengths)
    if not over:
        return
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    raise PromptError(
        f"{places[longest]}: prompt and response have {lengths[longest]} tokens, and the model "
        f"has {positions} positions (max_position_embeddings in its config.json); {over} of "
        f"{len(lengths)} rows are longer. Take them out, or shorten their responses"
    )
