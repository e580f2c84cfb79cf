"""`efr`: one command for all programs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from megatron_efr import __version__
from megatron_efr.arguments import run

PROGRAMS = {
    "train": "reinforcement learning, the main job",
    "sft": "supervised fine-tuning on responses",
    "dpo": "preference optimization: short right answers against long ones",
    "evaluate": "accuracy and tokens of a model folder",
    "compare": "two evaluations of the same problems: paired intervals and tests",
    "sweep": "a family: train, evaluate and report models by what varies",
    "watch": "a live view of a run in the terminal",
    "grade": "a file of responses: who is judged how, and why",
    "report": "the HTML page of a run folder",
    "import": "a model folder from a GGUF file",
    "convert": "Hugging Face folder to Megatron checkpoint, and back",
    "inspect": "what is in a checkpoint, and whether it verifies",
    "plan": "what a run will take in memory and time, before anything is downloaded",
    "doctor": "what this machine has and lacks for a run, and what to do",
}


def main() -> None:
    """Hand the arguments to the program that is named first."""
    run(_dispatch, sys.argv[1:])


def _dispatch(argv: Sequence[str] | None) -> None:
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(
            ("usage: efr PROGRAM ...\n\n")
            + "\n".join(f"  {key:10}{text}" for key, text in PROGRAMS.items())
        )
        print(
            "\n`efr PROGRAM --help` says more; under several processes: torchrun -m "
            "megatron_efr.PROGRAM ..."
        )
    elif name == "--version":
        print(__version__)
    elif name in PROGRAMS:
        # a report of a finished run needs no torch: programs are imported when they are asked for
        importlib.import_module(f"megatron_efr.{_MODULES.get(name, name)}").main(rest)
    else:
        sys.exit(f"efr: no program {name!r}; there are: {', '.join(PROGRAMS)}")


_MODULES = {
    "report": "report.__main__",
    "import": "import_gguf",
    "inspect": "inspect_checkpoint",
    "doctor": "doctor.__main__",
    "plan": "planning.__main__",
}


if __name__ == "__main__":
    main()
