"""`efr report`: write the HTML page of a run folder (again)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_efr import arguments
from megatron_efr.report.run_page import write_run_page
from megatron_efr.runfolder import RunFolder
from megatron_efr.types import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `efr report`."""
    parser = argparse.ArgumentParser(prog="efr report", description="Write the HTML page of a run folder.")
    parser.add_argument("folder", type=Path, help="runs/NAME: a run or a sweep")
    given = parser.parse_args(argv)
    if not given.folder.is_dir():
        raise UserError(f"{given.folder}: no such run folder")
    print(write_run_page(RunFolder(given.folder)))


if __name__ == "__main__":
    arguments.run(main)
