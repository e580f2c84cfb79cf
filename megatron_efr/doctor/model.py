"""Reads a model folder as the run would: the weights opened, one prompt rendered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_efr.config import (
    DatasetConfig,
    ModelConfig,
    PromptConfig,
    RunConfig,
    SftConfig,
    TrainConfig,
)
from megatron_efr.data.datasets import load_problems
from megatron_efr.data.prompts import Renderer, load_tokenizer
from megatron_efr.data.readers import read_rows
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


def _questions(config: RunConfig) -> Iterator[str]:
    """The first question of each data set on this machine; one of a hub would have to be
    downloaded.
    """
    if isinstance(config, SftConfig):
        if Path(config.data.path).expanduser().exists() and not holds_answers(config.data.path):
            [row] = read_rows(config.data.path, limit=1)
            yield str(row.columns.get(config.data.question, _EXAMPLE))
        return
    section = (
        config.data if isinstance(config, TrainConfig) else getattr(config, "evaluation", None)
    )
    datasets: list[DatasetConfig] = [] if section is None else section.datasets
    for dataset in datasets:
        if Path(dataset.path).expanduser().exists():
            yield load_problems(dataset.model_copy(update={"limit": 1}))[0].question
