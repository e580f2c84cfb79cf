"""Real runs of two ranks: each host's first rank starts its engines, and none outlives any rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from megatron_efr.addresses import free_port
from megatron_efr.data.arithmetic import ArithmeticTask, write
from megatron_efr.run.folder import RunFolder
from tests.engine.conftest import PYTHON
from tests.loop.test_interruption import wait_for

pytestmark = [
    pytest.mark.parallel,
    pytest.mark.skipif(
        not os.access(PYTHON, os.X_OK), reason="bash tools/setup_sglang_cpu.sh makes .venv-sglang"
    ),
]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """One iteration of a tiny model with rollouts from SGLang, in `tmp_path`/run."""
    write(
        tmp_path / "task", 0, ArithmeticTask(max_terms=3, train_rows=24, test_rows=16, sft_rows=64)
    )
    config = {
        "name": "run",
        "runs": str(tmp_path),
        "model": {"path": str(tmp_path / "task/model"), "init": "random"},
        "data": {
            "datasets": [{"path": str(tmp_path / "task/train.jsonl")}],
            "prompt": {"template": "{question}"},
        },
        "rollout": {
            "engine": "sglang",
            "python": str(PYTHON),
            "prompts": 8,
            "samples": 2,
            "max_new_tokens": 24,
        },
        "method": {"name": "efr", "alpha": 0.1},
        "optimizer": {"lr": 1e-3},
        "train": {"iterations": 1},
        "observe": {"tensorboard": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "run.yaml"


def torchrun(config: Path, arguments: list[str], overrides: list[str]) -> subprocess.Popen[str]:
    """One agent of a run, outside any world of ranks."""
    outer = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    program = ["-m", "megatron_efr.train", str(config), *overrides]
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_efr.torchrun", *arguments, *program],
        env=outer | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def started_for(run: Path) -> list[psutil.Process]:
    """The supervisors of a run's servers."""
    settings = str(run / "engines")
    return [
        p
        for p in psutil.process_iter(["cmdline"])
        if any(settings in word for word in p.info["cmdline"] or [])
    ]


def test_each_of_two_hosts_starts_an_engine_and_rank_0_asks_both(config: Path) -> None:
    """Two agents of torchrun, each a host of one rank to the other, on one machine."""
    rendezvous = f"127.0.0.1:{free_port('127.0.0.1')}"
    nodes = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        rendezvous,
    ]
    agents = [
        torchrun(
            config, [*nodes, "--rdzv-id", "run", "--local-addr", "127.0.0.1"], ["rollout.engines=2"]
        )
        for _ in range(2)
    ]
    said = [agent.communicate(timeout=500)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(said)
    run = RunFolder(config.parent / "run")
    [line] = run.read_metrics()
    assert 0 < line["logprob_diff_mean"] <= 1e-4
    settings = [yaml.safe_load((run.path / f"engines/engine-{i}.yaml").read_text()) for i in (0, 1)]
    assert settings[0]["api-key"] == settings[1]["api-key"]
    assert settings[0]["random-seed"] + 1 == settings[1]["random-seed"]
    for i in (0, 1):
        assert "Prefill batch" in (run.path / f"engines/engine-{i}.log").read_text(), (
            "it was never asked"
        )
    assert started_for(run.path) == []


@pytest.mark.slow
def test_engines_on_the_ranks_own_places_end_when_any_rank_is_killed(config: Path) -> None:
    run = config.parent / "run"
    overrides = ["rollout.placement=colocated", "train.iterations=1000"]
    agent = torchrun(config, ["--standalone", "--nproc-per-node", "2"], overrides)
    wait_for(run / "journal/step_000002.jsonl", agent, 500)
    assert len(list((run / "engines").glob("engine-*.log"))) == 2
    servers = [
        process
        for found in started_for(run)
        for process in [found, *found.children(recursive=True)]
    ]
    # supervisor, web server, scheduler, detokenizer of each
    assert len({process.pid for process in servers}) >= 8
    ranks = [
        process
        for process in psutil.Process(agent.pid).children()
        if "megatron_efr.train" in process.cmdline()
    ]
    last = next(process for process in ranks if process.environ()["RANK"] == "1")
    last.send_signal(signal.SIGKILL)
    assert agent.wait(120) == 128 + signal.SIGKILL
    _, left = psutil.wait_procs(servers, timeout=60)
    assert [process.cmdline() for process in left] == []
