"""`efr plan`: memory and time of a run, from its configuration and the shape of its model alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from megatron_efr import arguments
from megatron_efr.config import TrainConfig
from megatron_efr.planning.gpus import GIB, Case, describe, remedies


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan; exit code 1 where it does not fit, after what would."""
    parser = arguments.parser("plan", "Memory of a run on each GPU, phase by phase, before anything is downloaded.")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--memory-gib", type=float, default=80, help="memory of a GPU")
    given = parser.parse_intermixed_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    with arguments.configured(TrainConfig, given):
        world, memory = given.nodes * given.gpus, int(given.memory_gib * GIB)
        fits = on_gpus(Case(given.config, tuple(given.overrides), world, memory), console)
    if not fits:
        sys.exit(1)


def on_gpus(case: Case, console: Console) -> bool:
    """Print what the run takes on each GPU, and the fewest changes that make it fit where it does not."""
    for line in describe(case):
        console.print(line)
    if case.fits:
        return True
    choices = remedies(case)
    console.print(
        "It does not fit. Any of these lines would:" if choices else "It does not fit, nor would three changes"
    )
    for choice in choices:
        quoted = (f"'{override}'" if " " in override else override for override in choice)
        console.print("  " + " ".join(quoted), markup=False)
    return False


if __name__ == "__main__":
    arguments.run(main)
