"""Fixtures of the loop's tests: programs as real processes, a small task, a method that always
rewards, a whole run.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_efr.data.arithmetic import ArithmeticTask, write
from megatron_efr.observe import deterministic

KILLED = Path(__file__).with_name("killed.py")
# of one program, on a machine that others keep busy: starting alone may take minutes there
LIMIT_S = 900

# A model that has learnt nothing earns nothing from the paper's method: its weights would stand
# still, and a resume that forgot them would go unnoticed. This one, installed as a third party's,
# rewards some length over others, and by what it saw before: its state must survive too.
METHOD = """
from typing import Any

import numpy as np
from megatron_efr import scripts
from megatron_efr.methods import Ask, Method, Needs
from megatron_efr.types import Credit

class Typical(Method):
    alpha: float = 0.0

    def rewards(self, group, known):
        return -np.abs(group.group.lengths - known.state.get("mean", 8.0) * (1 - self.alpha)) / 24

    def learn(self, state, groups, known):
        seen, mean = state.get("seen", 0), state.get("mean", 8.0)
        for group in groups:
            seen += 1
            mean += (float(group.group.lengths.mean()) - mean) / seen
        return {"seen": seen, "mean": mean}

class Failing(Typical):
    def credits(self, groups, known):
        return [Credit(group.rewards * np.nan) for group in groups] if known.state else None

class Scripted(Typical):
    script: dict[str, Any]
    needs = Needs(branches=True)

    def ask(self, visit, known):
        options = dict(self.script)
        return Ask(scripts=(scripts.build(options.pop("name"), options, "method.script"),) * visit.samples)

    def credits(self, groups, known):
        made = []
        for group in groups:
            answers = tuple(np.array([-a.length / 24 for _, a in r.answers]) for r in group.group.responses)
            made.append(Credit(group.rewards - group.rewards.mean(), branches=answers, beginnings=True))
        return made
"""

CONFIG = """
name: run
seed: 3
model: {{path: {task}/model, init: random}}
data:
  datasets: [{{path: {task}/train.jsonl, difficulty: difficulty}}]
  prompt: {{template: "{{question}}"}}
rollout: {{prompts: 4, samples: 4, max_new_tokens: 24, slots: 5}}
method: {{name: typical}}
algorithm: {{beta: 0.01}}
optimizer: {{lr: 1e-3}}
train: {{iterations: 4}}
checkpoint: {{every: 2}}
observe: {{tensorboard: false}}
"""

Program = Callable[..., subprocess.CompletedProcess[str]]


def install_method(folder: Path) -> None:
    """Lay METHOD into `folder`, as a package that registered itself: on the path it is `method:
    {name: typical}`.
    """
    (folder / "typical.py").write_text(METHOD)
    registration = folder / "typical-1.0.dist-info"
    registration.mkdir()
    (registration / "METADATA").write_text("Metadata-Version: 2.1\nName: typical\nVersion: 1.0\n")
    entries = "typical = typical:Typical\nfailing = typical:Failing\nscripted = typical:Scripted\n"
    (registration / "entry_points.txt").write_text(f"[megatron_efr.methods]\n{entries}")


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Runs `python -m megatron_efr.NAME ARGUMENTS...` and checks its exit code; `killed_at` as
    killed.py has it.
    """
    plugin = tmp_path_factory.mktemp("plugin")
    install_method(plugin)
    environment = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")
    }
    paths = [str(plugin), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}

    def run(
        name: str, *arguments: str, killed_at: str | None = None, expect: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        start = (
            ["-m", f"megatron_efr.{name}"] if killed_at is None else [str(KILLED), killed_at, name]
        )
        done = subprocess.run(
            [sys.executable, *start, *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        wanted = expect if expect is not None else 0 if killed_at is None else -signal.SIGKILL
        assert done.returncode == wanted, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl, test.jsonl, sft.jsonl and model/ of a small arithmetic task."""
    folder = tmp_path_factory.mktemp("task")
    write(folder, 0, ArithmeticTask(max_terms=3, train_rows=24, test_rows=16, sft_rows=64))
    return folder


@pytest.fixture(scope="session")
def config(task: Path) -> Path:
    """A run of four iterations, with a checkpoint after every other."""
    path = task / "train.yaml"
    path.write_text(CONFIG.format(task=task))
    return path


@pytest.fixture(scope="session")
def whole(config: Path, program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run, which nobody disturbed; to be read only."""
    runs = tmp_path_factory.mktemp("whole")
    program("train", config, f"runs={runs}")
    return runs / "run"


def metrics(folder: Path) -> list[str]:
    """The deterministic part of every metrics line, as text: equal only bit for bit."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.dumps(deterministic(json.loads(line))) for line in lines]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def state(folder: Path, step: int) -> dict[str, Any]:
    """State that a checkpoint keeps beside the weights."""
    return json.loads((folder / "checkpoints" / f"step_{step:06d}" / "state.json").read_text())
