"""Sides of a benchmark as processes that take turns: each answers a line with the figures of one
piece of work.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROWS = ("engine", "step", "iteration")


@dataclass(frozen=True, slots=True)
class Settings:
    """The measurements to make, and how often."""

    model: str
    train: str
    config: str  # of a run, `overrides` over it: the iteration that is measured
    overrides: tuple[str, ...] = ()
    trl_python: str | None = None
    trl_batch: int = 128
    rows: tuple[str, ...] = ROWS
    slots: int = 256
    engine_prompts: int = 1024
    engine_turns: int = 2
    step_tokens: int = 8192
    step_micro_batch: int = 16384
    step_sizes: tuple[tuple[int, int], ...] = ((64, 3), (128, 4))
    step_turns: int = 9
    steps_per_turn: int = 4
    iteration_turns: int = 4


class Side:
    """A process that answers every line on its input with one line of JSON, after doing its work
    once.
    """

    def __init__(self, command: list[str]) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            cwd=ROOT,
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
        raise RuntimeError(
            f"a side of the benchmark ended with status {self._process.wait()}: see its messages "
            "above"
        )

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


ANSWER = "answer "


def serve(work: Callable[[], dict[str, Any]]) -> None:
    """The other end of `Side`."""
    for _ in sys.stdin:
        print(ANSWER + json.dumps(work() | {"memory_mib": peak_mib()}), flush=True)


def peak_mib() -> float:
    """The process's largest resident memory so far.

    Linux's own count if there is one: getrusage's starts, in a child, with what its parent held.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return next(
            int(line.split()[1]) / 1024
            for line in status.read_text().splitlines()
            if line.startswith("VmHWM")
        )
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def timed_steps(
    settings: Settings, step: Callable[[], float], keep: Callable[[], None]
) -> Callable[[], dict[str, Any]]:
    """A turn of so many steps; the first turn is one step, whose gradients are kept."""
    turns = 0

    def work() -> dict[str, Any]:
        nonlocal turns
        turns += 1
        if turns == 1:
            loss = step()
            keep()
            return {"loss": loss}
        began = time.perf_counter()
        for _ in range(settings.steps_per_turn):
            step()
        return {"seconds": (time.perf_counter() - began) / settings.steps_per_turn}

    return work


def take_turns(ours: Side, theirs: Side, turns: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Both sides' answers, turn by turn, who goes first changing."""
    taken = []
    for turn in range(turns):
        if turn % 2:
            other = theirs.turn()
            taken.append((ours.turn(), other))
        else:
            taken.append((ours.turn(), theirs.turn()))
    return taken
