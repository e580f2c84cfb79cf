"""Times megatron_efr on the CPU, one thread, each figure beside what it replaces, measured in turns in one run.

    python tools/bench_cpu.py                                  # after `bash launch/quickstart.sh`: its model, its task
    python tools/bench_cpu.py --trl-python FOLDER/bin/python   # with TRL's row
    python tools/bench_cpu.py --quick                          # a smoke run: the figures mean nothing

Rows: the engine against `transformers` generate (see bench_engine.py); a policy step (`Policy.update`: forward,
backward, clip and Adam through Megatron's schedule, DDP and optimizer) against the same model in plain torch on the
same packed batch; one iteration of the quickstart (rollouts, grading, log-probs, two updates, publication) against
TRL's GRPOTrainer. Sides of a row run in processes of their own and take turns; while one works the other waits. A
figure is the median over turns, and a ratio the median of the turns' own ratios. Before a policy step is timed, loss
and gradients of both sides must agree.

TRL wants an environment of its own that sees this one's torch and transformers:

    python -m venv FOLDER
    ls -d $PWD/.venv/lib/python3.*/site-packages > $(ls -d FOLDER/lib/python3.*/site-packages)/shared.pth
    FOLDER/bin/pip install trl==1.16.0
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HINT = "run `bash launch/quickstart.sh` first (its warm start is enough), or name a folder and prompts of your own"
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4  # of the gradient's own norm, per tensor


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure, how often."""

    model: str
    train: str
    trl_python: str | None
    engine_prompts: int = 1024
    engine_turns: int = 2
    step_tokens: int = 8192
    step_sizes: tuple[tuple[int, int], ...] = ((64, 3), (128, 4))
    step_turns: int = 9
    steps_per_turn: int = 4
    prompts: int = 32
    samples: int = 8
    max_new_tokens: int = 200
    iteration_turns: int = 4


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison; `ours` and `theirs` in `unit`, `ratio` ours over theirs of each turn, its median."""

    name: str
    unit: str
    ours: float
    theirs: float | None
    ratio: float | None
    goal: str
    lengths: str
    our_memory_mib: float | None = None
    their_memory_mib: float | None = None
    note: str = ""


# -- sides: programs that do one piece of work each time they are told to ------------------------------------------------


class Side:
    """A process that answers every line on its input with one line of JSON, after doing its work once."""

    def __init__(self, command: list[str]) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, cwd=ROOT
        )

    def turn(self) -> dict[str, Any]:
        """One piece of work: what the side says of it. RuntimeError when it has ended instead."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the reading below says so
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        raise RuntimeError(f"a side of the benchmark ended with status {self._process.wait()}: see its messages above")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


ANSWER = "answer "


def serve(work: Callable[[], dict[str, Any]]) -> None:
    """The other end of `Side`."""
    for _ in sys.stdin:
        print(ANSWER + json.dumps(work() | {"memory_mib": peak_mib()}), flush=True)


def peak_mib() -> float:
    """The process's largest resident memory so far."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (1 << 20 if sys.platform == "darwin" else 1 << 10)
