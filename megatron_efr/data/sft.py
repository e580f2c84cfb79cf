"""Reads question and response rows for supervised fine-tuning; the prompt is rendered as in RL."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_efr.config import PromptConfig, SftDataConfig
from megatron_efr.data.lengths import check_rows
from megatron_efr.data.prompts import PromptError, Renderer, fits
from megatron_efr.data.readers import DatasetError, Row, read_rows
from megatron_efr.samples import Sample

ANSWERS = ".jsonl.zst"
"""The end of the name of a file of a run's own judged answers."""


def holds_answers(path: str) -> bool:
    """True for a file of a run's judged answers, or a folder of such files."""
    place = Path(path).expanduser()
    return path.endswith(ANSWERS) or (place.is_dir() and any(place.glob(f"*{ANSWERS}")))


@dataclass(frozen=True, slots=True)
class SftRows:
    """Trainable responses in the file's order, and how many rows were left out because their prompt
    is too long.
    """

    samples: list[Sample]
    overlong: int


def load_sft(
    config: SftDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    positions: int | None = None,
) -> SftRows:
    """Rows as prompt + response + EOS, one for each response; `Sample.prompt_length` marks where
    the loss begins.

    DatasetError names file and line of a row without question or response; PromptError, of one that
    is longer than the model's `positions`, if they are given.
    """
    # the model must also learn where a response ends
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise PromptError(
            f"{tokenizer.name_or_path}: the tokenizer names no eos token, which ends every response"
        )
    # read and render all rows
    rows = read_rows(config.path, limit=config.limit)
    questions = [_column(row, config.question) for row in rows]
    responses = [_responses(row, config.response) for row in rows]
    rendered = Renderer(tokenizer, prompt).render(questions, [row.where for row in rows])
    flat = [response for own in responses for response in own]
    batch: Any = tokenizer(flat, add_special_tokens=False, return_attention_mask=False)
    # prompt + response + EOS, without the rows whose prompt is too long
    encoded, samples, places, overlong = iter(batch["input_ids"]), [], [], 0
    for row, (_, ids), own in zip(rows, rendered, responses, strict=True):
        short = fits(len(ids), prompt, row.where)
        overlong += not short
        for response in islice(encoded, len(own)):
            if short:
                end = [] if response and response[-1] == eos else [eos]
                samples.append(Sample(np.array([*ids, *response, *end], np.int32), len(ids)))
                places.append(row.where)
    # something must be left, and fit the model's positions
    if not samples:
        raise PromptError(
            f"{config.path}: all {len(rows)} prompts are longer than prompt.max_tokens"
        )
    if positions is not None:
        check_rows([sample.length for sample in samples], places, positions)
    return SftRows(samples, overlong)


def _responses(row: Row, columns: str | list[str]) -> list[str]:
    """The row's responses; of several columns those that hold one, and DatasetError if none
    does.
    """
    if isinstance(columns, str):
        return [_column(row, columns)]
    held = [name for name in columns if not _empty(row, name)]
    if not held:
        raise DatasetError(
            f"{row.where}: no text in any of the columns {', '.join(columns)}; a row needs one "
            "response"
        )
    return [_column(row, name) for name in held]


def _empty(row: Row, name: str) -> bool:
    """True if the row has such a column, and nothing in it; NaN: a table has nothing there."""
    if name not in row.columns:
        return False
    value = row.columns[name]
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _column(row: Row, name: str) -> str:
    value = row.columns.get(name)
    if isinstance(value, str) and value.strip():
        return value
    found = (
        ""
        if value is None
        else ", but an empty one"
        if isinstance(value, str)
        else f", but a {type(value).__name__}"
    )
    raise DatasetError(
        f"{row.where}: no text in column {name!r}{found}; the row has columns "
        f"{', '.join(map(str, row.columns))}"
    )
