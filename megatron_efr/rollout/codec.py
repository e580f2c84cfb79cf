"""Text to tokens and back: the one place where responses are read as text, and scripts' texts
become tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from megatron_efr.types import Group, Response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


KEPT = 256
"""Texts whose tokens are kept: more than a script repeats, and a run's summaries, each another, do
not add up.
"""


class Codec(Protocol):
    """A tokenizer, as far as an engine needs it."""

    def encode(self, text: str) -> tuple[int, ...]:
        """The tokens of a text within a response; special tokens by their names."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens, spaces left alone."""
        ...


class TokenizerCodec:
    """A tokenizer's codec. It keeps the tokens of the KEPT texts that it was asked for last:
    scripts repeat a few.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.encode = lru_cache(KEPT)(self._encode)

    def decode(self, tokens: Sequence[int]) -> str:
        text: Any = self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))


class NoText:
    """Stands in for a tokenizer if nobody reads what is said: in benchmarks, and in tests of tokens
    alone.
    """

    def encode(self, text: str) -> tuple[int, ...]:
        raise ValueError(f"{text!r}: an engine without a tokenizer knows no text")

    def decode(self, tokens: Sequence[int]) -> str:
        return ""


def with_text(group: Group, codec: Codec) -> Group:
    """The group with its responses' texts, and those of their branches."""

    def told(response: Response) -> Response:
        branches = tuple(
            branch._replace(responses=tuple(told(each) for each in branch.responses))
            for branch in response.branches
        )
        text = response.text or codec.decode(response.tokens)  # a branch may have its own by now
        return replace(response, text=text, branches=branches)

    return replace(group, responses=tuple(told(response) for response in group.responses))
