"""Builds the engine that a configuration asks for, and starts the servers that it needs."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import torch

from megatron_efr.config import ConfigError, EnginesConfig, ModelConfig, RolloutConfig
from megatron_efr.rollout.engine import Engine
from megatron_efr.rollout.launcher import Launcher, server_arguments, server_environment
from megatron_efr.rollout.local import LocalEngine
from megatron_efr.rollout.sglang import SGLangEngine
from megatron_efr.weights.architecture import Architecture

KEY = "SGLANG_API_KEY"
"""Environment variable with the key of the servers in `rollout.urls`."""


def build_engine(model: ModelConfig, rollout: RolloutConfig, folder: Path, seed: int, resources: ExitStack) -> Engine:
    """The engine of a run; what must be closed at its end is given to `resources`.

    Servers started here write to `folder`. They are asked for random numbers of their own: `seed` and those after it.
    """
    if rollout.engine == "local":
        if rollout.overlap and torch.cuda.is_available():
            raise ConfigError(
                "rollout.async: the embedded engine would decode on the GPU that trains, from another thread; set "
                "rollout.engine: sglang, or leave async out"
            )
        if model.routing == "replay":
            raise ConfigError(
                "model.routing: replay needs an engine that says which experts it chose; set rollout.engine: sglang"
            )
        return local_engine(model.path, rollout.slots, model.dtype)
    trainers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    first_gpu = trainers if rollout.placement == "apart" else 0
    return sglang_engine(model, rollout, folder, seed, resources, first_gpu=first_gpu)


def sglang_engine(
    model: ModelConfig, engines: EnginesConfig, folder: Path, seed: int, resources: ExitStack, *, first_gpu: int
) -> SGLangEngine:
    """Servers that this process alone starts, on the GPUs from `first_gpu` on, or those in `urls`, as one engine."""
    architecture = Architecture.from_folder(model.path)
    urls, key = engines.urls, os.environ.get(KEY)
    if not urls:
        launcher = resources.enter_context(Launcher(folder, engines.timeouts.stop_s))
        on_gpu = torch.cuda.is_available()
        arguments = server_arguments(model, engines, architecture, on_gpu, first_gpu)
        environment = server_environment(os.environ, on_gpu, engines.tp)
        launcher.start(engines.python, arguments, environment, count=engines.engines, seed=seed)
        urls, key = launcher.wait(engines.timeouts.start_s), launcher.key
    engine = SGLangEngine(
        urls,
        architecture,
        engines.slots,
        engines.timeouts,
        key=key,
        engine_ranks=engines.tp,
        bucket_bytes=engines.bucket_mib * 2**20,
        routed_experts=model.routing == "replay",
    )
    resources.callback(engine.close)
    return engine


def local_engine(model: str, slots: int, dtype: str) -> LocalEngine:
    """The embedded engine for a model folder, on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LocalEngine(model, slots, device, getattr(torch, dtype))
