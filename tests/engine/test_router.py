"""A real sglang-router before two real servers: every response comes back once, whatever dies."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.request import Request as Call
from urllib.request import urlopen

import psutil
import pytest

from megatron_efr.addresses import KEY
from megatron_efr.config import ConfigError, EnginesConfig, ModelConfig, RolloutConfig
from megatron_efr.errors import UserError
from megatron_efr.rollout.build import build_engine, sglang_engine
from megatron_efr.rollout.codec import NoText
from megatron_efr.rollout.servers.process import ServerProcess
from megatron_efr.rollout.servers.run_servers import Servers as RunServers
from megatron_efr.rollout.sglang.engine import SGLangEngine
from megatron_efr.rollout.sglang.router import start_router
from megatron_efr.weights.architecture import Architecture
from tests.engine.conftest import PYTHON, SLOTS, rollout
from tests.engine.faults import LIMITS, Servers, wait_until
from tests.engine.test_faults import COUNT, LONG, assert_each_came_once, figures
from tests.engine.test_parity import Models, weights_of
from tests.engine_contract import requests


@pytest.fixture(scope="module")
def router_here() -> None:
    """Skips what needs a router if the engines' Python has none."""
    if os.access(PYTHON, os.X_OK):
        found = subprocess.run(
            [PYTHON, "-c", "import sglang_router.launch_router"], capture_output=True
        )
        if found.returncode:
            pytest.skip(
                f"{PYTHON} has no sglang_router: bash tools/setup_sglang_cpu.sh installs it"
            )


@pytest.fixture
def router(router_here: None, servers: Servers, tmp_path: Path) -> Iterator[ServerProcess]:
    process = start_router(servers.config, tmp_path, servers.key)
    yield process
    process.end()


@pytest.fixture
def engine(servers: Servers, router: ServerProcess, models: Models) -> Iterator[SGLangEngine]:
    """Over both servers, which serve the first model as version 1, behind the router, started again
    once at most.
    """
    servers.revive()
    made = SGLangEngine(
        servers.urls,
        Architecture.from_folder(servers.model),
        SLOTS,
        LIMITS,
        key=servers.key,
        router=(router, 1),
    )
    made.publish(weights_of(models[0]), version=1)
    wait_until(lambda: workers(router, servers) == set(servers.urls), "the router has both servers")
    wait_until(lambda: made._fleet.routed, "the fleet goes through it")  # pyright: ignore[reportAttributeAccessIssue]
    made.health()
    yield made
    made.close()


def workers(router: ServerProcess, servers: Servers) -> set[str]:
    """Whom the router asks, in its own words; nobody if it does not answer."""
    try:
        with urlopen(
            Call(f"{router.url}/workers", headers={"Authorization": f"Bearer {servers.key}"}),
            timeout=5,
        ) as said:
            text = said.read().decode()
    except OSError:
        return set()
    return {url for url in servers.urls if f'"{url}"' in text}


def test_groups_come_back_once_through_the_router_and_both_servers_are_asked(
    engine: SGLangEngine, router: ServerProcess
) -> None:
    assert_each_came_once(list(engine.generate(requests(COUNT), LONG)), 1)
    # it counts a response once it has passed it on, which may be after we have it
    wait_until(lambda: sum(answered(router)) >= 2 * COUNT, "the router has counted them all", 20)
    assert min(answered(router)) > 0
    assert len(answered(router)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("program", ["run", "evaluation"])
def test_whoever_asks_for_a_router_gets_one_and_leaves_none(
    program: str, servers: Servers, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, servers.key)
    asked = {
        "engine": "sglang",
        "python": str(PYTHON),
        "slots": SLOTS,
        "router": True,
        "urls": servers.urls,
    }
    asked |= {"timeouts": LIMITS.model_dump()}
    model, architecture = (
        ModelConfig(path=str(servers.model)),
        Architecture.from_folder(servers.model),
    )
    with ExitStack() as resources:
        if program == "run":
            running = RunServers(servers.urls, servers.key)
            engine = build_engine(
                model,
                architecture,
                RolloutConfig.model_validate(asked),
                running,
                tmp_path,
                NoText(),
                resources,
            )
        else:
            engine = sglang_engine(
                model,
                architecture,
                EnginesConfig.model_validate(asked),
                tmp_path,
                0,
                NoText(),
                resources,
            )
        engine.publish(weights_of(models[0]), version=1)
        wait_until(lambda: routers() == 1 and engine._fleet.routed, "the fleet goes through it")  # pyright: ignore
        assert_each_came_once(list(engine.generate(requests(COUNT), LONG)), 1)
    assert routers() == 0
    assert servers.key not in (tmp_path / "router.log").read_text()


def routers() -> int:
    """Number of those that this process runs."""
    return sum(
        "sglang::router" in process.cmdline()
        for process in psutil.Process().children(recursive=True)
    )


def answered(router: ServerProcess) -> list[int]:
    """Number of responses that the router has had of each server."""
    command = psutil.Process(router.process.pid).cmdline()
    port = command[command.index("--prometheus-port") + 1]
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as said:
        text = said.read().decode()
    return [
        int(n)
        for n in re.findall(r'^smg_worker_cb_outcomes_total.*outcome="success"} (\d+)$', text, re.M)
    ]


def test_a_router_killed_in_the_middle_loses_no_response_and_is_started_again(
    engine: SGLangEngine, router: ServerProcess, servers: Servers, capfd: pytest.CaptureFixture[str]
) -> None:
    stream = engine.generate(requests(COUNT), LONG)
    groups = [next(stream)]
    kill(router)
    groups += stream
    assert_each_came_once(groups, 1)
    health = engine.health()
    assert (health["serving"], health["lost"]) == (2, 0)
    assert health["resent"] > 0
    wait_until(lambda: workers(router, servers) == set(servers.urls), "the router is back")
    said = capfd.readouterr().err
    assert said.count(f"router {router.url} ended with exit code") == 1
    assert "it is started again, and 0 times more at most" in said
    kill(router)
    assert_each_came_once(list(engine.generate(requests(COUNT), LONG)), 1)
    wait_until(lambda: "it stays down" in capfd.readouterr().err, "the router stays down")
    assert router.process.poll() is not None


@pytest.mark.slow
def test_a_router_that_hangs_loses_no_response_and_is_started_again(
    engine: SGLangEngine, router: ServerProcess, servers: Servers, capfd: pytest.CaptureFixture[str]
) -> None:
    stream = engine.generate(requests(COUNT), LONG)
    groups = [next(stream)]
    for process in psutil.Process(router.process.pid).children(recursive=True):
        process.suspend()
    groups += stream
    assert_each_came_once(groups, 1)
    assert figures(engine) == (2, 0, 0)
    wait_until(lambda: workers(router, servers) == set(servers.urls), "the router is back")
    assert f"router {router.url} does not answer" in capfd.readouterr().err


def kill(router: ServerProcess) -> None:
    for process in psutil.Process(router.process.pid).children(recursive=True):
        process.kill()


@pytest.mark.slow
def test_a_server_killed_behind_the_router_loses_no_response_and_comes_back_behind_it(
    engine: SGLangEngine, router: ServerProcess, servers: Servers, models: Models
) -> None:
    stream = engine.generate(requests(COUNT), LONG)
    groups = [next(stream)]
    servers.kill(0)
    groups += stream
    assert_each_came_once(groups, 1)
    assert figures(engine) == (1, 1, 0)
    wait_until(
        lambda: workers(router, servers) == {servers.urls[1]}, "the router has the other alone"
    )
    servers.restart(0)

    def back() -> bool:
        engine.publish(weights_of(models[0]), version=2)
        return engine.count == 2

    wait_until(back, "the restarted server takes part")
    wait_until(
        lambda: workers(router, servers) == set(servers.urls), "the router has both servers again"
    )
    assert_each_came_once(list(engine.generate(requests(COUNT), LONG)), 2)


@pytest.mark.slow
def test_a_server_frozen_behind_the_router_holds_no_response_up(
    engine: SGLangEngine, servers: Servers
) -> None:
    stream = engine.generate(requests(COUNT), LONG)
    groups = [next(stream)]
    servers.freeze(1)
    try:
        groups += stream
        assert_each_came_once(groups, 1)
        assert figures(engine) == (1, 1, 0)
    finally:
        servers.thaw(1)


def test_a_router_that_cannot_be_had_is_refused(tied_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rollout\.router: the embedded engine has no servers"):
        RolloutConfig(router=True)
    bare = tmp_path / "python"
    bare.write_text(
        "#!/bin/sh\necho \"ModuleNotFoundError: No module named 'sglang_router'\" >&2\nexit 1\n"
    )
    bare.chmod(0o755)
    with pytest.raises(
        UserError,
        match=r"No module named 'sglang_router'.*pip install --no-deps sglang-router==0\.3\.2",
    ):
        start_router(rollout(router=True, python=str(bare)), tmp_path, None)
    with (
        ExitStack() as stack,
        pytest.raises(ConfigError, match=r"rollout\.router: .* routed experts"),
    ):
        build_engine(
            ModelConfig(path="", routing="replay"),
            Architecture.from_folder(tied_model),
            rollout(router=True),
            RunServers(),
            tmp_path,
            NoText(),
            stack,
        )
