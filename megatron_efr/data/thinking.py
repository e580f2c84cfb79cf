"""The texts around a thought in a model's responses: as configured, or as its tokenizer has
them.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from megatron_efr.config import ConfigError, ThinkingConfig
from megatron_efr.types import Marks

OPENS, CLOSES = "<think>", "</think>"


def thinking_marks(config: ThinkingConfig, tokenizer: PreTrainedTokenizerBase) -> Marks | None:
    """The marks; None if nothing closes a thought. ConfigError for a configured one that no
    response can hold.

    One that is not configured is `<think>` or `</think>` if that is a single token, and stays in a
    response's text. A special token does not: text is read without those.
    """
    for key, text in (("opens", config.opens), ("closes", config.closes)):
        if text is not None and text.strip() not in (read := _read(text, tokenizer)):
            raise ConfigError(
                f"model.thinking.{key}: {text!r} would never be found in a response: with this "
                f"model's tokenizer it reads {read!r}; name a text of ordinary tokens"
            )
    closes = config.closes or _single(CLOSES, tokenizer)
    return Marks(config.opens or _single(OPENS, tokenizer), closes) if closes else None


def _single(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text if it is a single token that is read as such, else nothing."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return text if len(tokens) == 1 and _read(text, tokenizer) == text else ""


def _read(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that is left of `text` once it became tokens and text again."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return str(
        tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )
