"""Fixtures of the engine's tests: one real SGLang server a session, in float32, with one thread."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest
from transformers import Qwen2ForCausalLM

from megatron_efr.config import ModelConfig, RolloutConfig, TimeoutsConfig
from megatron_efr.rollout.codec import Codec
from megatron_efr.rollout.servers.launcher import Launcher
from megatron_efr.rollout.sglang.engine import SGLangEngine
from megatron_efr.weights.architecture import Architecture
from tests.conftest import make_model_folder

if TYPE_CHECKING:
    from tests.engine.faults import Servers

PYTHON = Path(__file__).parents[2] / ".venv-sglang/bin/python"
SLOTS = 32
STOP = 2


def rollout(**changes: object) -> RolloutConfig:
    """The rollout section of the tests' servers."""
    return RolloutConfig.model_validate(
        {"engine": "sglang", "python": str(PYTHON), "slots": SLOTS} | changes
    )


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one shape with different weights."""
    place = tmp_path_factory.mktemp("models")
    return tuple(make_model_folder(place / str(seed), tied=True, seed=seed) for seed in (0, 1))


@pytest.fixture(scope="session")
def models(folders: tuple[Path, Path]) -> tuple[Qwen2ForCausalLM, Qwen2ForCausalLM]:
    """The same two, as transformers has them."""
    return tuple(Qwen2ForCausalLM.from_pretrained(folder).eval() for folder in folders)


def start(
    folder: Path,
    config: RolloutConfig,
    model: Path,
    extra: Mapping[str, Any] | None = None,
    **changes: Any,
) -> tuple[Launcher, list[str]]:
    """Servers of their own, ready, with `extra` arguments; `changes` are of the model's section."""
    if not os.access(PYTHON, os.X_OK):
        pytest.skip(f"{PYTHON} is not there: bash tools/setup_sglang_cpu.sh makes it")
    launcher = Launcher(folder, config.timeouts.stop_s)
    shape, architecture = ModelConfig(path=str(model), **changes), Architecture.from_folder(model)
    try:
        for index in range(config.engines or 1):
            launcher.start_engine(
                shape, architecture, config, index, seed=0, on_gpu=False, extra=extra or {}
            )
        return launcher, launcher.wait(config.timeouts.start_s)
    except BaseException:
        launcher.close()
        raise


@pytest.fixture(scope="session")
def server(
    folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """The session's server: its address and its key."""
    launcher, urls = start(tmp_path_factory.mktemp("engines"), rollout(), folders[0])
    with launcher:
        yield urls[0], launcher.key


@pytest.fixture(scope="session")
def servers(
    folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    """Two servers for all tests that kill them: starting them is what takes time. They may be found
    dead.
    """
    from tests.engine.faults import Servers  # it starts servers as this module does

    made = Servers(tmp_path_factory.mktemp("engines"), folders[0])
    yield made
    made.close()


class MakeSGLang(Protocol):
    """Makes an engine over the session's server, or over what is given."""

    def __call__(
        self,
        url: str | None = None,
        key: str | None = None,
        limits: TimeoutsConfig | None = None,
        codec: Codec | None = None,
    ) -> SGLangEngine: ...


@pytest.fixture
def make_engine(server: tuple[str, str], folders: tuple[Path, Path]) -> Iterator[MakeSGLang]:
    """Engines over the session's server; they are closed, and the server goes on, after each
    test.
    """
    architecture = Architecture.from_folder(folders[0])
    made: list[SGLangEngine] = []

    def make(
        url: str | None = None,
        key: str | None = None,
        limits: TimeoutsConfig | None = None,
        codec: Codec | None = None,
    ) -> SGLangEngine:
        at, limits = [url or server[0]], limits or TimeoutsConfig()
        made.append(
            SGLangEngine(at, architecture, SLOTS, limits, key=key or server[1], codec=codec)
        )
        return made[-1]

    yield make
    for engine in made:
        engine.close()
