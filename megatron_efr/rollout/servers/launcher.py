"""Starts SGLang servers, waits until they are ready, has them watched, and ends them.

Each server runs under a supervisor (`supervisor.py`) in a session of its own: Ctrl-C does not reach
it, and when the process that started it is gone, however it went, the supervisor ends the server
and all that the server started.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from megatron_efr import log
from megatron_efr.addresses import LOOPBACK, free_port
from megatron_efr.config import EnginesConfig, ModelConfig, TimeoutsConfig
from megatron_efr.errors import UserError
from megatron_efr.rollout.checks import check_servable
from megatron_efr.rollout.servers.process import ServerProcess
from megatron_efr.rollout.servers.watch import Watch
from megatron_efr.weights.architecture import Architecture

SAYS_EVERY_S = 15.0

CPU_ARGUMENTS: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "cuda_graph_backend_decode": "disabled",
    "cuda_graph_backend_prefill": "disabled",
    "sleep_on_idle": True,  # else it spins on a core that the trainer needs
}
"""Arguments with which SGLang runs on plain torch."""

CPU_ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
"""One thread: two contended ones are slower by far. Dynamo would compile for most of a minute."""

CPU_CACHED_TOKENS = 65536

REFUSED = {
    "model_path": "the servers take model.path's config.json",
    "dtype": "the servers take model.dtype",
    "tp_size": "set rollout.tp",
    "host": "set by the launcher",
    "port": "set by the launcher",
    "api_key": "made for each run",
    "base_gpu_id": "follows from rollout.placement",
    "enable_custom_logit_processor": (
        "a processor changes the distribution, and log-probs would not be the sampler's"
    ),
    "preferred_sampling_params": (
        "they change the distribution, and log-probs would not be the sampler's"
    ),
}
"""Arguments of SGLang's server that a configuration may not set, and why."""

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
_TORCHRUN_PREFIXES = ("LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_", "PYTHON", "PYTORCH_")


def server_environment(outer: Mapping[str, str], on_gpu: bool, tp: int) -> dict[str, str]:
    """`outer` without what torchrun and the trainer's interpreter set for themselves.

    A server that finds RANK or MASTER_ADDR joins the trainer's group instead of its own; memory in
    expandable segments (PYTORCH_CUDA_ALLOC_CONF) cannot be shared by CUDA IPC; PYTHONPATH is
    another interpreter's.
    """
    kept = {
        name: value
        for name, value in outer.items()
        if name not in _TORCHRUN and not name.startswith(_TORCHRUN_PREFIXES)
    }
    kept["HF_HUB_OFFLINE"] = "1"  # the model is a folder
    # YaRN reaches beyond config.json's limit
    kept["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    if not on_gpu:
        kept |= CPU_ENVIRONMENT | {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(["0"] * tp)}
    return kept


def server_arguments(
    model: ModelConfig,
    rollout: EnginesConfig,
    architecture: Architecture,
    on_gpu: bool,
    first_gpu: int = 0,
    shared: bool = False,
) -> dict[str, Any]:
    """Arguments that the servers of a run are started with, by SGLang's names; `rollout.server` has
    the last word.

    `first_gpu` is the first server's, which may be `shared` with a trainer.
    """
    if refused := sorted(REFUSED.keys() & rollout.server.keys()):
        raise UserError(f"rollout.server.{refused[0]}: {REFUSED[refused[0]]}")
    check_servable(architecture)
    arguments: dict[str, Any] = {
        "model_path": str(Path(model.path).resolve()),
        "load_format": "dummy",  # weights come by publication, and are never read twice
        "skip_tokenizer_init": True,
        "skip_server_warmup": True,
        "context_length": architecture.max_positions,
        "dtype": model.dtype,
        "tp_size": rollout.tp,
        "max_running_requests": rollout.slots,
        # as the policy's head: bf16 logits move log-probs by 1e-2
        "enable_fp32_lm_head": model.dtype != "float32",
        "enable_return_routed_experts": model.routing == "replay",
        "log_level_http": "warning",
    }
    if on_gpu:
        arguments["base_gpu_id"] = first_gpu
        arguments["enable_memory_saver"] = shared  # without it they release nothing
    else:
        arguments |= CPU_ARGUMENTS | {
            "max_total_tokens": max(CPU_CACHED_TOKENS, architecture.max_positions)
        }
    return arguments | rollout.server


class Launcher:
    """The servers that this process starts. Use it as a context manager, or call `close`.

    Configuration, key and logs lie in `folder`, which only its owner may read: SGLang reads its
    arguments from a file, so that `ps` shows no key, but writes them to its log.
    """

    def __init__(self, folder: Path, stop_s: float, key: str | None = None) -> None:
        self.folder, self._stop_s = folder, stop_s
        self.key = key or secrets.token_hex(32)
        self.servers: list[ServerProcess] = []
        self._watch: Watch | None = None

    def start_engine(
        self,
        model: ModelConfig,
        architecture: Architecture,
        engines: EnginesConfig,
        index: int,
        *,
        seed: int,
        on_gpu: bool,
        first_gpu: int = 0,
        shared: bool = False,
        host: str = LOOPBACK,
        port: int | None = None,
        extra: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Start engine number `index` of a run, with random numbers of its own; returns before it
        is ready.

        It takes `tp` GPUs from `first_gpu` on, `shared` with a trainer or not.
        `extra` are more arguments of
        the server.
        """
        arguments = server_arguments(model, engines, architecture, on_gpu, first_gpu, shared)
        arguments |= {"random_seed": (seed + index) % 2**31, **extra}
        environment = server_environment(os.environ, on_gpu, engines.tp)
        self.start_one(
            f"engine-{index}", engines.python, arguments, environment, host=host, port=port
        )

    def start_one(
        self,
        name: str,
        python: str,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str],
        *,
        host: str = LOOPBACK,
        port: int | None = None,
    ) -> None:
        """Start one server, which listens on `host` alone, at any free port if none is given."""
        if not os.access(python, os.X_OK):
            raise UserError(
                f"rollout.python: {python}: no such interpreter; on a machine without a GPU, "
                "`bash tools/setup_sglang_cpu.sh` makes .venv-sglang"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        port = port or free_port(host)
        settings = {**arguments, "host": host, "port": port, "api_key": self.key}
        file = self.folder / f"{name}.yaml"
        file.write_text(
            yaml.safe_dump({key.replace("_", "-"): value for key, value in settings.items()})
        )
        command = [python, "-m", "sglang.launch_server", "--config", str(file)]
        url = f"http://{host}:{port}"
        self.servers.append(
            ServerProcess(name, url, self.folder, command, environment, self._stop_s)
        )

    def wait(self, limit_s: float) -> list[str]:
        """Wait until all are ready, saying so now and then; their addresses, or a UserError with
        the log's end.
        """
        began = said = time.monotonic()
        waiting = list(self.servers)
        while waiting:
            waited = time.monotonic() - began
            for server in waiting:
                if server.process.poll() is not None:
                    raise UserError(f"{server.name} ended before it was ready; {server.tail()}")
                if waited > limit_s:
                    late = (
                        f"{server.name} is not ready after rollout.timeouts.start_s = {limit_s:g} s"
                    )
                    raise UserError(f"{late}; {server.tail()}")
            if time.monotonic() - said > SAYS_EVERY_S:
                said = time.monotonic()
                log.info(
                    f"waiting for {len(waiting)} SGLang servers ({waited:.0f} s); logs: "
                    f"{self.folder}"
                )
            time.sleep(0.5)
            waiting = [server for server in waiting if not server.made_ready(self.key)]
        return [server.url for server in self.servers]

    def watch(self, limits: TimeoutsConfig, restarts: int) -> Watch:
        """From now on servers that end or hang are started again, each `restarts` times at most;
        call it when ready.
        """
        self._watch = Watch(self.servers, self.key, limits, restarts)
        return self._watch

    def close(self) -> None:
        """End every server, and wait until nothing is left of any."""
        if self._watch is not None:
            self._watch.close()
        for server in self.servers:
            server.terminate()
        for server in self.servers:
            server.wait()
        if self._watch is not None:
            self._watch.join()

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
