"""One host's part of a run, started for real: engines alone, played by a small HTTP server, or two
ranks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_efr.cluster.commands import commands
from megatron_efr.cluster.placement import place
from megatron_efr.config import RolloutConfig
from megatron_efr.run.folder import RunFolder
from megatron_efr.run.interruption import EXIT_REQUEUE
from tests.loop.test_interruption import CONFIG, wait_for

# What stands for `.venv-sglang/bin/python -m sglang.launch_server --config FILE`: notes how it was
# started, is ready.
SERVER = """#!{python}
import http.server, json, os, sys, yaml
settings = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
json.dump([settings, dict(os.environ)], open("{folder}/" + str(settings["port"]) + ".json", "w"))
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer((settings["host"], settings["port"]), Ready).serve_forever()
"""


@pytest.mark.parallel
def test_a_host_starts_its_engines_clean_and_leaves_none(task: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(SERVER.format(python=sys.executable, folder=tmp_path))
    python.chmod(0o755)
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(task=task) + f"runs: {tmp_path}\n")
    overrides = ["rollout.engine=sglang", f"rollout.python={python}"]
    command = [
        sys.executable,
        "-m",
        "megatron_efr.cluster",
        str(config),
        *overrides,
        "--only-engines",
    ]
    outer = os.environ | {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "x",
        "TORCHELASTIC_RUN_ID": "y",
    }
    where = ["--hosts", "127.0.0.1", "--host", "127.0.0.1", "--gpus", "2"]
    running = subprocess.Popen([*command, *where], env=outer | {"SGLANG_API_KEY": "secret"})
    for port in (30000, 30001):
        wait_for(tmp_path / f"{port}.json", running)
    family = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(signal.SIGUSR1)  # SLURM's warning: the iteration at hand still needs them
    running.send_signal(signal.SIGTERM)
    assert running.wait(120) == 128 + signal.SIGTERM
    assert not psutil.wait_procs(family, timeout=30)[1]
    for number, port in enumerate((30000, 30001)):
        settings, environment = json.loads((tmp_path / f"{port}.json").read_text())
        assert (settings["host"], settings["port"], settings["api-key"]) == (
            "127.0.0.1",
            port,
            "secret",
        )
        assert environment["CUDA_VISIBLE_DEVICES"] == str(number)
        assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & environment.keys()


@pytest.mark.parallel
def test_a_host_runs_the_trainer_and_answers_as_it_does(task: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(task=task) + f"runs: {tmp_path}\n")
    where = ["--hosts", "127.0.0.1", "--host", "127.0.0.1", "--gpus", "2", "--port", "29533"]
    command = [
        sys.executable,
        "-m",
        "megatron_efr.cluster",
        str(config),
        "train.iterations=1000",
        *where,
    ]
    running = subprocess.Popen(
        command, env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    )
    run = tmp_path / "run"
    wait_for(run / "journal/step_000001.jsonl", running)
    running.send_signal(signal.SIGUSR1)
    assert running.wait(300) == EXIT_REQUEUE
    last = RunFolder(run).read_metrics()[-1]["step"]
    assert (run / "checkpoints/latest").read_text() == f"step_{last:06d}"
    [trainer] = commands(place(["a"], 2, RolloutConfig()), "c.yaml", [], "r")
    assert "--resume" in trainer.words, "what was saved would be refused and not resumed"
