"""Builds the engine that a configuration asks for, over the servers of a run or over some of its
own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from megatron_efr.addresses import KEY, wait_until_ready
from megatron_efr.config import ConfigError, EnginesConfig, ModelConfig, RolloutConfig
from megatron_efr.errors import EngineError, UserError
from megatron_efr.rollout.checks import check_servable
from megatron_efr.rollout.codec import Codec
from megatron_efr.rollout.engine import Engine
from megatron_efr.rollout.local.engine import LocalEngine
from megatron_efr.rollout.servers.launcher import Launcher
from megatron_efr.rollout.servers.process import ServerProcess
from megatron_efr.rollout.servers.run_servers import Servers
from megatron_efr.rollout.sglang.engine import SGLangEngine
from megatron_efr.rollout.sglang.penalty import SERVER
from megatron_efr.rollout.sglang.router import start_router
from megatron_efr.weights.architecture import Architecture

ENGINES: dict[str, type[LocalEngine] | type[SGLangEngine]] = {
    "local": LocalEngine,
    "sglang": SGLangEngine,
}
"""By the name that `rollout.engine` gives them."""


def build_engine(
    model: ModelConfig,
    architecture: Architecture,
    rollout: RolloutConfig,
    servers: Servers,
    folder: Path,
    codec: Codec,
    resources: ExitStack,
) -> Engine:
    """The engine of a run, over its `servers`; what must be closed at its end is given to
    `resources`. A router's log goes to `folder`. ConfigError as of `check_engine`.
    """
    check_engine(model, rollout)
    if rollout.embedded:
        return local_engine(architecture, rollout.slots, model.dtype, codec)
    return _connected(
        model, architecture, rollout, servers.urls, servers.key, folder, codec, resources
    )


def check_engine(model: ModelConfig, rollout: RolloutConfig) -> None:
    """Refuse, with a ConfigError, what the engine of a run, or the router before it, cannot
    give.
    """
    if rollout.embedded:
        if rollout.overlap and torch.cuda.is_available():
            raise ConfigError(
                "rollout.async: the embedded engine would decode on the GPU that trains, from "
                "another thread; set rollout.engine: sglang, or leave async out"
            )
        if model.routing == "replay" and "routing" not in ENGINES[rollout.engine].abilities:
            raise ConfigError(
                "model.routing: replay needs an engine that returns the experts it chose; set "
                "rollout.engine: sglang"
            )
    else:
        _check_router(model, rollout)


def open_engine(
    model: ModelConfig,
    architecture: Architecture,
    engines: EnginesConfig,
    logs: Path,
    seed: int,
    codec: Codec,
    resources: ExitStack,
    penalties: bool = False,
) -> Engine:
    """The embedded engine, or SGLang's servers, for the shape of `model`; without weights yet.
    Servers take scripts that penalise tokens only if they are told to.
    """
    if engines.embedded:
        return local_engine(architecture, engines.slots, model.dtype, codec)
    return sglang_engine(model, architecture, engines, logs, seed, codec, resources, penalties)


def sglang_engine(
    model: ModelConfig,
    architecture: Architecture,
    engines: EnginesConfig,
    folder: Path,
    seed: int,
    codec: Codec,
    resources: ExitStack,
    penalties: bool = False,
) -> SGLangEngine:
    """Servers that this process alone starts, on the first GPUs, or those in `urls`, as one engine.
    With `penalties` scripts may penalise tokens.

    They write to `folder`, and take random numbers from `seed` and those after it. One that ends or
    hangs is started again, without weights. ConfigError before any is started for what a router
    does not pass on.
    """
    _check_router(model, engines, penalties)
    # servers that run already
    if engines.urls:
        key = os.environ.get(KEY)
        return _connected(
            model, architecture, engines, engines.urls, key, folder, codec, resources, penalties
        )
    # or servers of this process's own, watched and started again
    launcher = resources.enter_context(Launcher(folder, engines.timeouts.stop_s))
    for index in range(engines.engines or 1):
        launcher.start_engine(
            model, architecture, engines, index, seed=seed, on_gpu=torch.cuda.is_available(),
            first_gpu=index * engines.tp,
            extra=SERVER if penalties else {},
        )  # fmt: skip
    urls = launcher.wait(engines.timeouts.start_s)
    launcher.watch(engines.timeouts, engines.restarts)
    return _connected(
        model, architecture, engines, urls, launcher.key, folder, codec, resources, penalties
    )


def _connected(
    model: ModelConfig,
    architecture: Architecture,
    engines: EnginesConfig,
    urls: Sequence[str],
    key: str | None,
    folder: Path,
    codec: Codec,
    resources: ExitStack,
    penalties: bool = False,
) -> SGLangEngine:
    """Running servers as one engine, behind a router if one is asked for."""
    # a model that SGLang serves, a router if asked for, and servers that answer
    check_servable(architecture)
    router = _router(engines, key, folder, resources)
    wait_until_ready(urls, engines.timeouts.start_s)
    # one engine over all of them
    try:
        engine = SGLangEngine(
            urls,
            architecture,
            engines.slots,
            engines.timeouts,
            key=key,
            engine_ranks=engines.tp,
            bucket_bytes=engines.bucket_mib * 2**20,
            dtype=model.dtype,
            routed_experts=model.routing == "replay",
            penalties=penalties,
            router=router and (router, engines.restarts),
            codec=codec,
        )
    except EngineError as error:
        hint = f"; is the key of the servers in rollout.urls in {KEY}?" if engines.urls else ""
        raise UserError(f"{error}{hint}") from error
    resources.callback(engine.close)
    return engine


def _check_router(model: ModelConfig, engines: EnginesConfig, penalties: bool = False) -> None:
    """Refuse, with a ConfigError, a router that does not pass on what is asked of servers."""
    if engines.router and penalties:
        raise ConfigError(
            "rollout.router: evaluation.script penalises tokens, and sglang-router does not pass "
            "that on; leave router out"
        )
    if engines.router and model.routing == "replay":
        raise ConfigError(
            "rollout.router: sglang-router does not pass on the request for routed experts, "
            "which model.routing: replay needs; leave router out"
        )


def _router(
    engines: EnginesConfig, key: str | None, folder: Path, resources: ExitStack
) -> ServerProcess | None:
    if not engines.router:
        return None
    router = start_router(engines, folder, key)
    resources.callback(router.end)
    return router


def local_engine(architecture: Architecture, slots: int, dtype: str, codec: Codec) -> LocalEngine:
    """The embedded engine for a model, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LocalEngine(architecture, slots, device, getattr(torch, dtype), codec)
