"""Builds the engine that a configuration asks for, over the servers that were started for it."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from megatron_efr.config import ConfigError, ModelConfig, RolloutConfig
from megatron_efr.rollout.addresses import wait_until_ready
from megatron_efr.rollout.engine import Engine
from megatron_efr.rollout.local import LocalEngine
from megatron_efr.rollout.servers import Servers
from megatron_efr.rollout.sglang import SGLangEngine
from megatron_efr.weights.architecture import Architecture


def build_engine(model: ModelConfig, rollout: RolloutConfig, servers: Servers, resources: ExitStack) -> Engine:
    """The engine of a run, over its `servers`; what must be closed at its end is given to `resources`."""
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
    wait_until_ready(servers.urls, rollout.timeouts.start_s)
    engine = SGLangEngine(
        servers.urls,
        Architecture.from_folder(model.path),
        rollout.slots,
        rollout.timeouts,
        key=servers.key,
        engine_ranks=rollout.tp,
        bucket_bytes=rollout.bucket_mib * 2**20,
        routed_experts=model.routing == "replay",
    )
    resources.callback(engine.close)
    return engine


def local_engine(model: str, slots: int, dtype: str) -> LocalEngine:
    """The embedded engine for a model folder, on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LocalEngine(model, slots, device, getattr(torch, dtype))
