"""`efr train CONFIG --replay FILE`: the updates of saved rollouts alone, without engine and
graders; writes nothing.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_efr.observe import Observer
from megatron_efr.run.folder import metrics_line, read_rollouts
from megatron_efr.run.run import Run
from megatron_efr.types import Credited, UserError

Improve = Callable[[Run, int, list[Credited], Observer], dict[str, float]]
"""Trains on an iteration's credited groups; returns its metrics."""


def replay(run: Run, file: Path, improve: Improve) -> None:
    """Bring the policy to where it stood before `file`'s iteration, run the iteration's updates,
    print its metrics.

    It starts from the newest checkpoint before that iteration, or the starting model. The
    iterations between are learnt from their own rollouts first, if all of them were kept: only then
    are these the run's numbers.
    """
    config = run.config
    ranks = run.ranks
    folder = run.folder
    step = step_of(file)
    # from the nearest checkpoint, over the rollouts between
    start = run.load(step - 1)
    between = [folder.rollouts_path(number) for number in range(start + 1, step)]
    if left_out := ranks.share(lambda: [path for path in between if not path.exists()]):
        between = []
    # said before the work: these numbers may not be the run's
    if ranks.is_main:
        print(
            f"replaying iteration {step} from "
            f"{f'the checkpoint of iteration {start}' if start else 'the start'}"
        )
        if left_out:
            print(
                f"the numbers will not be the run's: {left_out[0]} and what lies between was not "
                "kept",
                flush=True,
            )
    # no figure goes where the run's own are
    silent = config.observe.model_copy(update={"tensorboard": False, "wandb": None})
    with Observer(
        _Printed(folder.path), silent, step, ranks.rank, start, config.name, ranks.largest
    ) as observer:
        # rollouts from disk in the engines' place, and the run's own improvement
        metrics: dict[str, float] = {}
        for path in [*between, file]:
            with observer.phase("rollout"):
                groups = (
                    ranks.on_main(functools.partial(read_rollouts, path), "saved rollouts") or []
                )
            metrics = improve(run, step_of(path), groups, observer)
        observer.log(step, metrics)


def step_of(file: Path) -> int:
    """The iteration whose rollouts these are, from the name that a run folder gives them; UserError
    otherwise.
    """
    name = re.fullmatch(r"step_(\d+)\.jsonl\.zst", file.name)
    if name is None or int(name[1]) < 1:
        raise UserError(
            f"{file}: its name says no iteration; give a run folder's file, like "
            "step_000010.jsonl.zst"
        )
    return int(name[1])


class _Printed:
    """Stands in for an observer that writes to a run folder, and prints."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        print(metrics_line(step, metrics), flush=True)
