"""Reads a model folder and data sets as the run would: the weights opened, one prompt rendered."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from megatron_efr.config import (
    DatasetConfig,
    DpoConfig,
    ModelConfig,
    PromptConfig,
    RunConfig,
    SftConfig,
    TrainConfig,
)
from megatron_efr.data.datasets import load_problems
from megatron_efr.data.prompts import Renderer, load_tokenizer
from megatron_efr.data.readers import DatasetError, is_local, read_rows
from megatron_efr.data.sft import holds_answers
from megatron_efr.doctor.finding import Finding
from megatron_efr.errors import UserError
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import initial_weights

_EXAMPLE = "What is 1 + 1?"


def check_weights(model: ModelConfig, architecture: Architecture, seed: int) -> Finding:
    """Check that the weights are there, whole by their headers, and those that config.json
    describes.
    """
    try:
        weights = initial_weights(model, architecture, seed)
    except UserError as error:
        return Finding(
            "weights",
            "problem",
            str(error),
            "model.path=FOLDER, or model.init=random to begin with none",
        )
    drawn = "to be drawn from the seed" if model.init == "random" else f"in {model.path}"
    return Finding("weights", "ok", f"{len(weights.shapes)} tensors {drawn}")


def check_prompt(config: RunConfig, architecture: Architecture) -> Finding:
    """The first question as the model will read it."""
    prompt = (
        config.data.prompt
        if isinstance(config, TrainConfig)
        else getattr(config, "prompt", PromptConfig())
    )
    try:
        renderer = Renderer(load_tokenizer(config.model.path, architecture.raw), prompt)
        [(text, ids)] = renderer.render([next(_questions(config), _EXAMPLE)])
    except UserError as error:
        return Finding("prompt", "problem", str(error), "see data.prompt in docs/configuration.md")
    if len(ids) > prompt.max_tokens:
        found = f"{len(ids)} tokens, more than prompt.max_tokens = {prompt.max_tokens}: {text!r}"
        return Finding(
            "prompt", "problem", found, "raise prompt.max_tokens, or shorten prompt.template"
        )
    return Finding("prompt", "ok", f"{len(ids)} tokens: {text!r}")


def check_data(config: RunConfig) -> Finding:
    """Check that every data set is there, and that its first row is one; of a hub's, which would
    have to be downloaded, the name alone is told.
    """
    if isinstance(config, SftConfig | DpoConfig):
        sources = [(config.data.path, partial(_first_row, config.data.path))]
    else:
        sources = [(d.path, partial(load_problems, _one_row(d))) for d in _datasets(config)]
    faults = []
    for path, read in sources:
        # answers of a run are never on the hub
        if isinstance(config, DpoConfig) or is_local(path):
            try:
                read()
            except UserError as error:
                faults.append(str(error))
    if faults:
        advice = "see data.datasets, evaluation.datasets and data.path in docs/configuration.md"
        return Finding("data", "problem", "; ".join(faults), advice)
    return Finding("data", "ok", ", ".join(path for path, _ in sources) or "none is asked for")


def _first_row(path: str) -> None:
    if not Path(path).expanduser().exists():
        raise DatasetError(f"{path}: no such file or folder")
    if not holds_answers(path):
        read_rows(path, limit=1)


def _datasets(config: RunConfig) -> list[DatasetConfig]:
    """Those of training and of evaluation."""
    evaluation = getattr(config, "evaluation", None)
    return [
        *(config.data.datasets if isinstance(config, TrainConfig) else ()),
        *(() if evaluation is None else evaluation.datasets),
    ]


def _one_row(dataset: DatasetConfig) -> DatasetConfig:
    return dataset.model_copy(update={"limit": 1})


def _questions(config: RunConfig) -> Iterator[str]:
    """The first question of each data set on this machine that can be read; one of a hub would have
    to be downloaded.
    """
    if isinstance(config, SftConfig):
        if Path(config.data.path).expanduser().exists() and not holds_answers(config.data.path):
            [row] = read_rows(config.data.path, limit=1)
            yield str(row.columns.get(config.data.question, _EXAMPLE))
        return
    for dataset in _datasets(config):
        if Path(dataset.path).expanduser().exists():
            yield load_problems(_one_row(dataset))[0].question
