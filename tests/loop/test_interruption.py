"""A run that is asked to end finishes its iteration, saves, asks to be requeued, and resumed equals
one undisturbed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml

from megatron_efr.run.folder import RunFolder
from megatron_efr.run.interruption import EXIT_REQUEUE
from tests.loop.conftest import Program, digests, metrics, state

CONFIG = """
name: run
seed: 3
model: {{path: {task}/model, init: random}}
data:
  datasets: [{{path: {task}/train.jsonl}}]
  prompt: {{template: "{{question}}"}}
rollout: {{prompts: 4, samples: 4, max_new_tokens: 24}}
method: {{name: efr, alpha: 0.1}}
algorithm: {{beta: 0.01}}
optimizer: {{lr: 1e-3}}
train: {{iterations: 3}}
checkpoint: {{every: 2}}
observe: {{tensorboard: false}}
"""


@pytest.fixture(scope="module")
def config(task: Path) -> Path:
    path = task / "interrupted.yaml"
    path.write_text(CONFIG.format(task=task))
    return path


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """A program of this package as a process of its own, outside any world of ranks."""
    environment = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")
    }
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # what a shell runs in the background, these tests perhaps, ignores Ctrl-C, and so would
        # this
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 300) -> None:
    """Until `path` is there; fails if the process ends before."""
    limit = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit, f"{path} did not appear"
        time.sleep(0.02)


def end(process: subprocess.Popen[str], number: int) -> str:
    """Send the signal and wait: the process asks for requeuing. Its output."""
    process.send_signal(number)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == EXIT_REQUEUE, output
    return output


def test_a_run_that_is_asked_to_end_saves_this_iteration_and_goes_on_bit_for_bit(
    config: Path, program: Program, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole/run", tmp_path / "asked/run"
    program("train", config, f"runs={whole.parent}")
    running = start(["megatron_efr.train", str(config), f"runs={run.parent}"])
    wait_for(run / "journal/step_000001.jsonl", running)
    end(running, signal.SIGTERM)
    assert (run / "checkpoints/latest").read_text() == "step_000001", (
        "no checkpoint was due, and one was needed"
    )
    assert metrics(run) == metrics(whole)[:1]
    assert not (run / "model").exists()
    program("train", "--resume", config, f"runs={run.parent}")
    assert metrics(run) == metrics(whole)
    assert digests(run / "rollouts") == digests(whole / "rollouts")
    assert digests(run / "model") == digests(whole / "model")
    assert state(run, 3) == state(whole, 3)


@pytest.mark.parallel
def test_the_launcher_hands_a_signal_on_and_answers_as_the_ranks_do(
    config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    torchrun = ["megatron_efr.torchrun", "--standalone", "--nproc-per-node=2"]
    program = ["-m", "megatron_efr.train", str(config), f"runs={tmp_path}", "train.iterations=1000"]
    running = start([*torchrun, *program])
    wait_for(run / "journal/step_000002.jsonl", running)
    output = end(running, signal.SIGUSR1)
    assert "SIGUSR1: the workers end after this iteration" in output
    last = RunFolder(run).read_metrics()[-1]["step"]
    assert 2 <= last < 1000
    assert (run / "checkpoints/latest").read_text() == f"step_{last:06d}", (
        "the ranks did not agree where to end"
    )
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["iterations"] == 1000


@pytest.mark.parallel
def test_a_sweep_that_is_asked_to_end_saves_its_runs_and_goes_on_bit_for_bit(
    config: Path, program: Program, tmp_path: Path
) -> None:
    held_out = (
        f"evaluation: {{datasets: [{{path: {config.parent}/test.jsonl}}], samples: 2, "
        f"max_new_tokens: 24}}\n"
    )
    family = tmp_path / "family.yaml"
    family.write_text(config.read_text() + held_out)
    whole, run, member = tmp_path / "whole/run", tmp_path / "asked/run", "alpha-0.5"
    arguments = ["--alphas=0.5", str(family), "train.iterations=8", "checkpoint.every=1000"]
    running = start(["megatron_efr.sweep", *arguments, f"runs={run.parent}"])
    wait_for(run / member / "journal/step_000001.jsonl", running)
    assert f"sweep: SIGTERM: {member} asked to end" in end(running, signal.SIGTERM)
    saved = (run / member / "checkpoints/latest").read_text()
    assert "step_000001" <= saved < "step_000008", "no checkpoint was due: it was asked to"
    assert not (run / "eval").exists()
    program("sweep", "--resume", *arguments, f"runs={run.parent}")
    program("sweep", *arguments, f"runs={whole.parent}")
    assert metrics(run / member) == metrics(whole / member)
    assert digests(run / member / "model") == digests(whole / member / "model")
    assert digests(run / "eval") == digests(whole / "eval")
    assert len(digests(run / "eval")) == 2


@pytest.mark.parallel
@pytest.mark.parametrize(
    "launcher",
    ["megatron_efr.torchrun", pytest.param("torch.distributed.run", marks=pytest.mark.slow)],
)
def test_a_launcher_that_is_killed_takes_its_ranks_along_and_the_run_is_free_at_once(
    config: Path, program: Program, tmp_path: Path, launcher: str
) -> None:
    torchrun = [
        launcher,
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "megatron_efr.train",
        str(config),
    ]
    running = start([*torchrun, f"runs={tmp_path}", "train.iterations=1000"])
    try:
        wait_for(tmp_path / "run/metrics.jsonl", running)
        ranks = psutil.Process(running.pid).children()
        assert len(ranks) == 2
        refused = program("train", "--resume", config, f"runs={tmp_path}", expect=2).stderr
    finally:
        running.kill()
        running.communicate()
    assert f"{tmp_path / 'run'}: is being worked on by process {ranks[0].pid} on host" in refused
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive
    done = program("train", "--resume", config, f"runs={tmp_path}", "train.iterations=1")
    assert f"{tmp_path / 'run'}: " in done.stderr


@pytest.mark.parallel
@pytest.mark.parametrize(
    "launcher", [[], ["megatron_efr.torchrun", "--standalone", "--nproc-per-node=2", "-m"]]
)
def test_ctrl_c_ends_a_run_with_130_and_one_line_of_its_own(
    config: Path, tmp_path: Path, launcher: list[str]
) -> None:
    running = start(
        [*launcher, "megatron_efr.train", str(config), f"runs={tmp_path}", "train.iterations=1000"]
    )
    wait_for(tmp_path / "run/metrics.jsonl", running)
    running.send_signal(signal.SIGINT)
    output = running.communicate(timeout=120)[0]
    assert running.returncode == 130, output
    assert output.splitlines().count("interrupted") == 1
    assert "Traceback" not in output
    assert not (tmp_path / "run/.lock").exists()


def test_the_launcher_passes_on_what_a_program_answers_by_itself(tmp_path: Path) -> None:
    failing = start(
        [
            "megatron_efr.torchrun",
            "--standalone",
            "--nproc-per-node=1",
            "-m",
            "megatron_efr.train",
            "no.yaml",
        ]
    )
    output = failing.communicate(timeout=300)[0]
    assert failing.returncode == 2, output
    assert "no.yaml: no such configuration file" in output
