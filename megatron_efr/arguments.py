"""The command line that every program shares: a configuration file, overrides, and errors that a person can read."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from megatron_efr.config import ConfigError, RunConfig
from megatron_efr.config.file import load
from megatron_efr.types import UserError

ConfigT = TypeVar("ConfigT", bound=RunConfig)

EXIT_USER_ERROR = 2
PATIENCE_S = 20.0  # for rank 0, which meets the same error


def parser(program: str, description: str, *, resumes: bool = False) -> argparse.ArgumentParser:
    """A program's parser, with the configuration file, the overrides and, where it `resumes`, that flag.

    Overrides may stand after flags: parse with `parse_intermixed_args`.
    """
    made = argparse.ArgumentParser(prog=f"efr {program}", description=description)
    made.add_argument("config", help="YAML file; see examples/")
    made.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the file's")
    if resumes:
        made.add_argument("--resume", action="store_true", help="go on from the run folder's newest checkpoint")
    return made


@contextmanager
def configured(kind: type[ConfigT], arguments: argparse.Namespace) -> Iterator[ConfigT]:
    """The configuration that the arguments name, checked; a ConfigError within the block says which file it is of."""
    config = load(kind, arguments.config, arguments.overrides)
    try:
        yield config
    except ConfigError as error:
        raise ConfigError("\n".join(f"{arguments.config}: {line}" for line in str(error).splitlines())) from error


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
        else:  # torchrun ends all when the first one has ended, and rank 0 is to say why
            time.sleep(PATIENCE_S)
        sys.exit(EXIT_USER_ERROR)
