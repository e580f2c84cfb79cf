"""A hundred kills at random moments, over every program and mode: each run ends as one that nobody
killed.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_efr.run.folder import RunFolder
from tests.loop.conftest import CONFIG, Program, digests, metrics, state
from tests.loop.test_ahead import CONFIG as AHEAD
from tests.loop.test_evaluate import CONFIG as EVALUATE
from tests.loop.test_resume import SFT

KILLS = 5  # of one run, before it may go on to its end
ITERATIONS = 8

HELD_OUT = (
    "evaluation: {{datasets: [{{path: {task}/test.jsonl}}], samples: 2, max_new_tokens: 24}}\n"
)
PROGRAMS: dict[str, tuple[str, str, list[str]]] = {
    "sync": ("train", CONFIG, [f"train.iterations={ITERATIONS}"]),
    "background": (
        "train",
        CONFIG,
        [f"train.iterations={ITERATIONS}", "checkpoint.background=true"],
    ),
    "async": ("train", AHEAD, [f"train.iterations={ITERATIONS}"]),
    "sft": ("sft", SFT, ["train.updates=16"]),
    "evaluate": ("evaluate", EVALUATE, []),
    "sweep": ("sweep", CONFIG + HELD_OUT, ["--alphas=0,0.5", "--jobs=2"]),
}
RUNS = {"sync": 5, "background": 4, "async": 3, "sft": 3, "evaluate": 3, "sweep": 2}


def compare_runs(run: Path, whole: Path) -> None:
    assert metrics(run) == metrics(whole)
    assert digests(run / "rollouts") == digests(whole / "rollouts")
    assert digests(run / "model") == digests(whole / "model")
    assert state(run, ITERATIONS) == state(whole, ITERATIONS)


def compare_ahead(run: Path, whole: Path) -> None:
    """No prompt is lost and none used twice, whenever groups finish: that is promised."""
    folder = RunFolder(run)
    assert [line["step"] for line in folder.read_metrics()] == list(range(1, ITERATIONS + 1))
    groups = [
        each.group for step in range(1, ITERATIONS + 1) for each in folder.read_rollouts(step)
    ]
    assert len({group.seed for group in groups}) == 4 * ITERATIONS
    left = state(run, ITERATIONS)["stream"]
    assert left["next_index"] == 4 * ITERATIONS + len(left["in_flight"])


def compare_warm_starts(run: Path, whole: Path) -> None:
    assert metrics(run) == metrics(whole)
    assert digests(run / "model") == digests(whole / "model")


def compare_evaluations(run: Path, whole: Path) -> None:
    assert digests(run / "eval") == digests(whole / "eval")


def compare_families(run: Path, whole: Path) -> None:
    for member in ("alpha-0", "alpha-0.5"):
        assert metrics(run / member) == metrics(whole / member)
        assert digests(run / member / "model") == digests(whole / member / "model")
    assert digests(run / "eval") == digests(whole / "eval")
    assert len(digests(run / "eval")) == 3
    assert (run / "report/index.html").exists()


COMPARE: dict[str, Callable[[Path, Path], None]] = {
    "sync": compare_runs,
    "background": compare_runs,
    "async": compare_ahead,
    "sft": compare_warm_starts,
    "evaluate": compare_evaluations,
    "sweep": compare_families,
}


@pytest.fixture(scope="module")
def undisturbed(
    task: Path, program: Program, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Any]:
    """The arguments of a kind of run, its folder after a run that nobody killed, and how many
    seconds that took.
    """
    made: dict[str, tuple[list[str], Path, float]] = {}

    def give(kind: str) -> tuple[list[str], Path, float]:
        if kind not in made:
            name, text, overrides = PROGRAMS[kind]
            config, runs = task / f"storm-{kind}.yaml", tmp_path_factory.mktemp(kind)
            config.write_text(text.format(task=task))
            flags = [text for text in overrides if text.startswith("--")]
            arguments = [
                *flags,
                str(config),
                *(text for text in overrides if not text.startswith("--")),
            ]
            program(name, *arguments, f"runs={runs}")
            began = min(
                path.stat().st_mtime for path in (runs / "run").rglob("*") if path.is_file()
            )
            made[kind] = arguments, runs / "run", time.time() - began
        return made[kind]

    return give


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "number"), [(kind, n) for kind, count in RUNS.items() for n in range(count)]
)
def test_a_run_that_is_killed_at_random_moments_ends_as_one_that_was_not(
    kind: str, number: int, program: Program, undisturbed: Callable[[str], Any], tmp_path: Path
) -> None:
    arguments, whole, seconds = undisturbed(kind)
    name, run = PROGRAMS[kind][0], tmp_path / "run"
    resumes = [] if name == "evaluate" else ["--resume"]
    moments = random.Random(f"{kind} {number}")
    for _ in range(KILLS):
        moment = f"working:{moments.uniform(0, seconds)}"
        program(name, *resumes, *arguments, f"runs={tmp_path}", killed_at=moment)
    program(name, *resumes, *arguments, f"runs={tmp_path}")
    COMPARE[kind](run, whole)
    left = [
        str(path)
        for path in run.rglob("*")
        if re.search(r"\.(tmp|lock|partial|damaged)$", path.name)
    ]
    assert not left
    assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == sorted(
        path.name for path in (whole / "checkpoints").glob("step_*")
    )


def test_a_storm_is_a_hundred_kills() -> None:
    assert KILLS * sum(RUNS.values()) == 100
