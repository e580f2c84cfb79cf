"""Stop tokens: those that end a response, by everything in a model folder that names one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_efr.config.json_object import read_object
from megatron_efr.data.prompts import PromptError, model_folder, read_config, vocabulary_size


def stop_ids(
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    config: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """Token ids that end a response: the tokenizer's EOS and the `eos_token_id` of both
    configurations, sorted.

    An engine that reads the folder stops at any of them. `config` is config.json's content, if it
    has been read. PromptError names the file whose ids are none, or outside the vocabulary.
    """
    place = model_folder(folder)
    config = read_config(place) if config is None else config
    size = vocabulary_size(place, config)
    # each place that names such tokens
    found = {place: [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []}
    path, other = place / "config.json", place / "generation_config.json"
    found[path] = _eos(path, config, tokenizer)
    if other.is_file():
        found[other] = _eos(other, read_object(other, PromptError), tokenizer)
    for where, ids in found.items():
        if outside := sorted(token for token in ids if not 0 <= token < size):
            raise PromptError(
                f"{where}: vocabulary mismatch: eos token ids {outside} are outside vocab_size "
                f"{size}"
            )
    if not any(found.values()):
        raise PromptError(
            f"{place}: neither the tokenizer nor generation_config.json nor config.json names an "
            "eos token"
        )
    return tuple(sorted({token for ids in found.values() for token in ids}))


def _eos(path: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The `eos_token_id` of the configuration at `path`: one id, several, or null."""
    given: Any = config.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool):
            known = tokenizer.get_vocab().get(token) if isinstance(token, str) else None
            hint = "" if known is None else f"; the tokenizer's id of it is {known}"
            raise PromptError(
                f"{path}: eos_token_id: a token id, or a list of them, is required, found "
                f"{given!r}{hint}"
            )
    return ids
