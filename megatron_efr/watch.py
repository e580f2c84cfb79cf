"""`efr watch`: a live view of a run in the terminal, from its metrics and its log, while it runs
and after it.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import yaml
from rich.console import Console
from rich.live import Live

from megatron_efr import arguments, log
from megatron_efr.errors import UserError
from megatron_efr.observe.dashboard import Watched, view
from megatron_efr.run.folder import RunFolder
from megatron_efr.run.owner import is_owned


def read(path: Path) -> Watched:
    """The run in folder `path` as it stands. UserError if there is none, or only a family's members
    below it.
    """
    folder = RunFolder(path)
    if not (folder.config.is_file() or folder.metrics.is_file() or folder.log.is_file()):
        below = sorted(str(found.parent) for found in path.glob("*/metrics.jsonl"))
        named = f"; the runs below it are {', '.join(below)}" if below else ""
        raise UserError(
            f"{path}: no run's folder: none of config.yaml, metrics.jsonl and log.txt is "
            f"there{named}"
        )
    return Watched(
        str(path),
        _total(folder),
        folder.read_metrics(),
        log.read(folder.log),
        is_owned(folder.lock),
    )


def _total(folder: RunFolder) -> int:
    """The last step of a run: iterations, or updates of a warm start; 0 if its configuration does
    not tell.
    """
    try:
        train = yaml.safe_load(folder.config.read_text(encoding="utf-8"))["train"]
        return int(train.get("iterations") or train["updates"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return 0


def watch(path: Path, console: Console, every_s: float) -> None:
    """Show the run anew every so many seconds until it ends, or Ctrl-C; then leave the last view in
    the terminal.
    """
    run = read(path)
    if console.is_terminal and not console.is_dumb_terminal and run.running:
        with _tidy(), Live(console=console, screen=True, auto_refresh=False) as live:
            try:
                while run.running:
                    live.update(view(run, console.width, datetime.now()), refresh=True)
                    time.sleep(every_s)
                    run = read(path)
            except KeyboardInterrupt:
                run = read(path)
    console.print(view(run, console.width, datetime.now()))


@contextlib.contextmanager
def _tidy() -> Iterator[None]:
    """Have SIGTERM end the program by an exception within the block, so that the terminal is itself
    again.
    """
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `efr watch`."""
    parser = argparse.ArgumentParser(
        prog="efr watch", description="A live view of a run in the terminal."
    )
    parser.add_argument("folder", type=Path, help="runs/NAME")
    parser.add_argument(
        "--every",
        type=arguments.within(float, 0.1),
        default=2.0,
        metavar="SECONDS",
        help="seconds between two views (default: 2)",
    )
    parser.add_argument("--once", action="store_true", help="one view, even if the run goes on")
    given = parser.parse_args(argv)
    console = Console(highlight=False, force_terminal=False if given.once else None)
    watch(given.folder, console, given.every)


if __name__ == "__main__":
    arguments.run(main)
