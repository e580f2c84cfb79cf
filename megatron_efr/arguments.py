"""The command line that every program shares: a configuration file, overrides, and errors that a person can read."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron_efr.config import RunConfig
from megatron_efr.config.file import load
from megatron_efr.types import UserError

ConfigT = TypeVar("ConfigT", bound=RunConfig)

EXIT_USER_ERROR = 2


def parser(program: str, description: str, *, resumes: bool = False) -> argparse.ArgumentParser:
    """A program's parser, with the configuration file, the overrides and, where it `resumes`, that flag."""
    made = argparse.ArgumentParser(prog=f"efr {program}", description=description)
    made.add_argument("config", help="YAML file; see examples/")
    made.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the file's")
    if resumes:
        made.add_argument("--resume", action="store_true", help="go on from the run folder's newest checkpoint")
    return made


def read(kind: type[ConfigT], arguments: argparse.Namespace) -> ConfigT:
    """The configuration that the arguments name, checked."""
    return load(kind, arguments.config, arguments.overrides)


def world_size() -> int:
    """How many ranks torchrun started; 1 without it. Known before they join."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def run(program: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> None:
    """Run a program; a UserError is printed by rank 0 without a traceback, and the exit code is 2."""
    try:
        program(argv)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
