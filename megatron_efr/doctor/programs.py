"""The program that a configuration is of, told by its sections."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml

from megatron_efr.config import DpoConfig, EvaluateConfig, RunConfig, SftConfig, TrainConfig
from megatron_efr.config.file import load


def load_any(path: str, overrides: Iterable[str]) -> RunConfig:
    """The configuration at `path`, of `efr train` (and `sweep`), `sft`, `dpo` or `evaluate`;
    ConfigError as `load`.
    """
    overrides = list(overrides)
    return load(
        _program(path, {override.partition("=")[0] for override in overrides}), path, overrides
    )


def _program(path: str, given: set[str]) -> type[RunConfig]:
    """SFT has one file of rows, DPO a preference too; an evaluation has nothing to learn from and
    no optimizer.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return TrainConfig  # to load it says what is wrong
    tree = tree if isinstance(tree, dict) else {}
    data = tree.get("data")
    sections = tree.keys() | {key.split(".")[0] for key in given}
    if (isinstance(data, dict) and "path" in data) or "data.path" in given:
        return DpoConfig if "preference" in sections else SftConfig
    learns = {"data", "optimizer", "train"} & sections
    return TrainConfig if learns else EvaluateConfig
