"""Servers' processes: what they are started with, and that none outlives the process that it works
for.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from megatron_efr.config import EnginesConfig, ModelConfig, RolloutConfig
from megatron_efr.errors import UserError
from megatron_efr.rollout.servers import supervisor
from megatron_efr.rollout.servers.launcher import Launcher, server_arguments, server_environment
from megatron_efr.weights.architecture import Architecture

# A server that starts workers, one of them in a session of its own, and one left behind by a
# process that ended.
TREE = """
trap '' TERM
echo $$ >> pids
sh -c 'echo $$ >> pids; exec sleep 300' &
setsid sh -c 'echo $$ >> pids; trap "" TERM HUP; sleep 300; :' &
sh -c 'setsid sh -c "echo \\$\\$ >> pids; exec sleep 300" &'
while :; do sleep 300; done
"""

# A trainer that starts that server in its main thread, or in another one that ends, and then waits.
TRAINER = f"""
import os, signal, subprocess, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
command = [sys.executable, "-I", {supervisor.__file__!r}, str(os.getpid()), "0.3", "sh", "tree.sh"]
thread = threading.Thread(target=lambda: subprocess.Popen(command, start_new_session=True))
thread.start()
thread.join()
time.sleep(300)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Callable[[int], list[int]]]:
    """Waits until the server's `count` processes are there; whatever is left of them is killed
    after the test.
    """
    (tmp_path / "tree.sh").write_text(TREE)

    def processes(count: int = 4) -> list[int]:
        for _ in range(600):
            pids = tmp_path / "pids"
            found = [int(pid) for pid in pids.read_text().split()] if pids.exists() else []
            if len(found) == count:
                return found
            time.sleep(0.1)
        raise AssertionError(f"{found} after a minute")

    yield processes
    if (tmp_path / "pids").exists():
        for pid in map(int, (tmp_path / "pids").read_text().split()):
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)


def gone(pids: list[int]) -> bool:
    """True if all end within half a minute."""
    for _ in range(300):
        if not any(map(runs, pids)):
            return True
        time.sleep(0.1)
    return False


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name
)
def test_nothing_outlives_the_trainer(
    tree: Callable[[], list[int]], tmp_path: Path, number: signal.Signals
) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    processes = tree()
    trainer.send_signal(number)
    trainer.wait(30)
    assert gone(processes)


def test_a_server_that_is_told_to_end_takes_its_descendants_along(
    tree: Callable[[], list[int]], tmp_path: Path
) -> None:
    command = [sys.executable, "-I", supervisor.__file__, str(os.getpid()), "0.3", "sh", "tree.sh"]
    process = subprocess.Popen(command, cwd=tmp_path)
    processes = tree()
    process.terminate()
    process.wait(30)
    assert gone(processes)


def test_a_server_dies_with_its_supervisor(tree: Callable[[], list[int]], tmp_path: Path) -> None:
    command = [sys.executable, "-I", supervisor.__file__, str(os.getpid()), "0.3", "sh", "tree.sh"]
    process = subprocess.Popen(command, cwd=tmp_path)
    server, *_ = tree()
    process.kill()
    process.wait(30)
    assert gone([server])


def test_a_supervisor_ends_as_its_command_does() -> None:
    command = [
        sys.executable,
        "-I",
        supervisor.__file__,
        str(os.getpid()),
        "1",
        "sh",
        "-c",
        "exit 7",
    ]
    assert subprocess.run(command, timeout=30).returncode == 7


# -- what servers are started with
# -------------------------------------------------------------------------------------


def test_servers_see_nothing_of_torchrun_or_of_the_trainers_interpreter() -> None:
    mine = {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
        "LOCAL_RANK": "3",
    }
    mine |= {
        "LOCAL_WORLD_SIZE": "8",
        "GROUP_RANK": "0",
        "ROLE_RANK": "3",
        "TORCHELASTIC_RUN_ID": "x",
    }
    mine |= {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTHONPATH": "/x",
        "OMP_NUM_THREADS": "1",
    }
    kept = {
        "PATH": "/bin",
        "HOME": "/root",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "NCCL_SOCKET_IFNAME": "eth0",
    }
    set_for_servers = {"HF_HUB_OFFLINE": "1", "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    assert server_environment(mine | kept, on_gpu=True, tp=1) == kept | set_for_servers
    on_cpu = server_environment(mine | kept, on_gpu=False, tp=2)
    assert on_cpu["SGLANG_CPU_OMP_THREADS_BIND"] == "0|0"
    assert on_cpu["OMP_NUM_THREADS"] == "1"
    assert "RANK" not in on_cpu


@pytest.mark.parametrize(("dtype", "fp32_head"), [("float32", False), ("bfloat16", True)])
def test_the_pass_through_has_the_last_word(tied_model: Path, dtype: str, fp32_head: bool) -> None:
    model = ModelConfig.model_validate({"path": str(tied_model), "dtype": dtype})
    rollout = RolloutConfig.model_validate(
        {
            "engine": "sglang",
            "slots": 8,
            "tp": 2,
            "server": {"mem_fraction_static": 0.6, "max_running_requests": 4},
        }
    )
    arguments = server_arguments(model, rollout, Architecture.from_folder(tied_model), on_gpu=True)
    assert arguments["mem_fraction_static"] == 0.6
    assert arguments["max_running_requests"] == 4
    assert (arguments["dtype"], arguments["tp_size"], arguments["enable_fp32_lm_head"]) == (
        dtype,
        2,
        fp32_head,
    )
    assert "device" not in arguments
    assert arguments["base_gpu_id"] == 0
    assert arguments["context_length"] == 512  # the model's positions


@pytest.mark.parametrize("shared", [False, True])
def test_servers_on_the_trainers_gpus_can_release_their_memory(
    tied_model: Path, shared: bool
) -> None:
    rollout = RolloutConfig.model_validate({"engine": "sglang"})
    model, architecture = ModelConfig(path=str(tied_model)), Architecture.from_folder(tied_model)
    arguments = server_arguments(model, rollout, architecture, on_gpu=True, shared=shared)
    assert arguments["enable_memory_saver"] is shared
    assert "enable_memory_saver" not in server_arguments(
        model, rollout, architecture, on_gpu=False, shared=True
    )


@pytest.mark.parametrize(
    ("argument", "why"),
    [
        ({"dtype": "float16"}, "dtype: the servers take model.dtype"),
        (
            {"enable_custom_logit_processor": True},
            "enable_custom_logit_processor: a processor changes the distribution",
        ),
    ],
)
def test_arguments_that_would_change_what_is_sampled_are_refused(
    tied_model: Path, argument: dict[str, object], why: str
) -> None:
    rollout = RolloutConfig.model_validate({"engine": "sglang", "server": argument})
    with pytest.raises(UserError, match=f"rollout.server.{why}"):
        server_arguments(
            ModelConfig(path=str(tied_model)),
            rollout,
            Architecture.from_folder(tied_model),
            on_gpu=True,
        )


def test_a_model_that_servers_would_decode_otherwise_names_the_engine_that_can(
    tied_model: Path,
) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    raw = json.loads((tied_model / "config.json").read_text())
    model, rollout = (
        ModelConfig(path=str(tied_model)),
        RolloutConfig.model_validate({"engine": "sglang"}),
    )
    usual = Architecture.from_config(raw | {"rope_parameters": rope})
    assert server_arguments(model, rollout, usual, on_gpu=False)["context_length"] == 2048
    own = Architecture.from_config(raw | {"rope_parameters": rope | {"attention_factor": 1.5}})
    with pytest.raises(
        UserError, match=r"does not read the attention_factor 1.5 .* set rollout\.engine: local"
    ):
        server_arguments(model, rollout, own, on_gpu=False)


@pytest.mark.parametrize(("first", "gpus"), [(4, [4, 6]), (0, [0, 2])])
def test_each_server_has_gpus_and_random_numbers_of_its_own(
    launcher: Launcher, tied_model: Path, tmp_path: Path, first: int, gpus: list[int]
) -> None:
    python = fake_python(tmp_path, "exec sleep 300")
    engines = EnginesConfig.model_validate({"engine": "sglang", "python": python, "tp": 2})
    model, architecture = ModelConfig(path=str(tied_model)), Architecture.from_folder(tied_model)
    for index in (0, 1):
        launcher.start_engine(
            model,
            architecture,
            engines,
            index,
            seed=2**31 - 1,
            on_gpu=True,
            first_gpu=first + 2 * index,
        )
    settings = [yaml.safe_load((launcher.folder / f"engine-{i}.yaml").read_text()) for i in (0, 1)]
    assert [s["base-gpu-id"] for s in settings] == gpus
    assert [s["random-seed"] for s in settings] == [2**31 - 1, 0]


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    with Launcher(tmp_path / "engines", stop_s=1) as made:
        yield made


def fake_python(folder: Path, script: str) -> str:
    """An interpreter that runs `script` whatever it is asked."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_server_that_ends_early_shows_the_end_of_its_log(
    launcher: Launcher, tmp_path: Path
) -> None:
    python = fake_python(
        tmp_path, "echo server_args=api_key; echo unrecognized arguments: --no-such; exit 2"
    )
    launcher.start_one("engine-0", python, {"no_such": 1}, os.environ)
    with pytest.raises(
        UserError, match=r"engine-0 ended before(.|\n)*unrecognized arguments: --no-such"
    ) as raised:
        launcher.wait(60)
    assert "api_key" not in str(raised.value)


def test_a_server_that_does_not_get_ready_is_named_with_its_limit(
    launcher: Launcher, tmp_path: Path
) -> None:
    launcher.start_one(
        "engine-0", fake_python(tmp_path, "echo loading; exec sleep 300"), {}, os.environ
    )
    with pytest.raises(
        UserError, match=r"engine-0 is not ready after rollout.timeouts.start_s = 1 s(.|\n)*loading"
    ):
        launcher.wait(1)


def test_an_interpreter_that_is_not_there_is_named_with_what_makes_it(launcher: Launcher) -> None:
    with pytest.raises(UserError, match=r"rollout\.python: /no/python(.|\n)*setup_sglang_cpu\.sh"):
        launcher.start_one("engine-0", "/no/python", {}, os.environ)


def test_the_key_is_in_a_file_of_the_owners_and_on_no_command_line(
    launcher: Launcher, tmp_path: Path
) -> None:
    python = fake_python(tmp_path, "exec sleep 300")
    for name in ("engine-0", "engine-1"):
        launcher.start_one(name, python, {"tp_size": 1}, os.environ)
    settings = [yaml.safe_load((launcher.folder / f"engine-{i}.yaml").read_text()) for i in (0, 1)]
    assert [s["api-key"] for s in settings] == [launcher.key, launcher.key]
    assert settings[0]["port"] != settings[1]["port"]
    assert {s["host"] for s in settings} == {"127.0.0.1"}
    assert launcher.folder.stat().st_mode & 0o077 == 0
    for server in launcher.servers:
        everyone = [
            psutil.Process(server.process.pid),
            *psutil.Process(server.process.pid).children(recursive=True),
        ]
        assert not [p for p in everyone if launcher.key in " ".join(p.cmdline())]
