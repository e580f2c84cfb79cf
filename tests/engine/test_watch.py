"""Real servers that are killed or frozen: they are back at their old address, as often as they may
be.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from megatron_efr.addresses import is_ready, status
from megatron_efr.config import TimeoutsConfig
from megatron_efr.policy.ranks import Ranks
from megatron_efr.publication.checksums import ChecksumCheck
from megatron_efr.publication.publisher import Publisher
from megatron_efr.publication.reshard import Parcel
from megatron_efr.publication.sglang_layout import EngineLayout
from megatron_efr.publication.transports import Broadcast
from megatron_efr.rollout.servers.launcher import Launcher
from megatron_efr.rollout.sglang.engine import SGLangEngine
from megatron_efr.weights.architecture import Architecture
from tests.engine.conftest import rollout, start
from tests.engine.published import distance, make_policy

LIMITS = TimeoutsConfig(hang_s=15, health_s=5, update_s=200)


@pytest.fixture
def launcher(folders: tuple[Path, Path], tmp_path: Path) -> Iterator[Launcher]:
    """One server, ready, nobody watching it yet."""
    made, _ = start(tmp_path / "engines", rollout(), folders[0])
    with made:
        yield made


def family(launcher: Launcher) -> list[psutil.Process]:
    """The supervisor, the web server, its scheduler and its detokenizer."""
    supervisor = psutil.Process(launcher.servers[0].process.pid)
    return [supervisor, *supervisor.children(recursive=True)]


def post(launcher: Launcher, path: str) -> None:
    """A control call without a body."""
    [server] = launcher.servers
    request = urllib.request.Request(
        server.url + path,
        data=json.dumps({"mode": "retract"}).encode(),
        headers={"Authorization": f"Bearer {launcher.key}", "Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=30).read()


def wait_until(holds: Callable[[], bool], seconds: float = 600) -> None:
    """Look now and then until it holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.3)


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[str], bool]]:
    """True if a text was written to stderr since the test began; shown whole if the test fails."""
    lines: list[str] = []

    def holds(text: str) -> bool:
        lines.append(capfd.readouterr().err)
        return text in "".join(lines)

    yield holds
    print("".join(lines))


@pytest.mark.slow
def test_a_server_that_is_killed_or_hangs_is_back_at_its_address_until_its_times_are_up(
    launcher: Launcher, said: Callable[[str], bool]
) -> None:
    [server] = launcher.servers
    watch = launcher.watch(LIMITS, restarts=1)
    before = family(launcher)

    # paused, and its scheduler busy for longer than hang_s: it may be loading weights
    post(launcher, "/pause_generation")
    scheduler = next(process for process in before if "scheduler" in " ".join(process.cmdline()))
    scheduler.suspend()
    time.sleep(LIMITS.hang_s + LIMITS.health_s + 2)
    scheduler.resume()
    wait_until(lambda: status(f"{server.url}/server_info", 5, launcher.key) == 200)
    assert family(launcher) == before, "a paused server was taken for one that hangs"

    # killed while restarts are put off, and put off again while it starts
    watch.hold()
    before[0].children()[0].kill()
    wait_until(
        lambda: said(
            "ended with exit code 137; it is started again, and 0 times more at most; the end of"
        )
    )
    time.sleep(3)
    assert server.process.poll() is not None, "it was started while restarts were put off"
    watch.allow()
    wait_until(lambda: server.process.poll() is None)
    watch.hold()
    assert server.process.poll() is not None, "it goes on starting while restarts are put off"
    watch.allow()
    wait_until(lambda: said("engine-0 is back at"))
    assert is_ready(server.url)
    assert status(f"{server.url}/server_info", 5, launcher.key) == 200, "it has another key"
    _, left = psutil.wait_procs(before, timeout=30)
    assert not left

    # frozen, all of it, and its times are up
    before = family(launcher)
    for process in before:
        process.suspend()
    wait_until(
        lambda: said(
            "hangs: no answer for rollout.timeouts.hang_s = 15 s; it "
            "stays down: rollout.restarts = 1"
        )
    )
    watch.join()
    _, left = psutil.wait_procs(before, timeout=30)
    assert not left
    logs = sorted(path.name for path in server.log.parent.glob("*.log"))
    assert logs == ["engine-0.1.log", "engine-0.2.log", "engine-0.log"]


class RefusedTwice(Broadcast):
    """Refuse what the first two publications send."""

    begun = 0

    def begin(self) -> None:
        super().begin()
        self.begun += 1

    def deliver(self, prepared: Parcel) -> None:
        wrong = Parcel([(name, tensor[..., :1]) for name, tensor in prepared.tensors], None)
        super().deliver(wrong if self.begun <= 2 else prepared)


@pytest.mark.slow
def test_a_server_that_fails_two_publications_is_started_again_and_takes_the_third(
    launcher: Launcher, said: Callable[[str], bool], folders: tuple[Path, Path], ranks: Ranks
) -> None:
    [server] = launcher.servers
    watch, before = launcher.watch(LIMITS, restarts=1), family(launcher)
    architecture = Architecture.from_folder(folders[1])
    engine = SGLangEngine(
        [server.url], architecture, 8, TimeoutsConfig(), key=launcher.key, engine_ranks=1
    )
    transport = RefusedTwice(engine, "127.0.0.1", "gloo")
    publisher = Publisher(
        transport,
        engine,
        ranks.cpu_world,
        check=lambda: ChecksumCheck(EngineLayout(architecture, 1), torch.float32, "sha256"),
        verify_every=1,
        restart=watch.restart,
    )
    publisher.publish(make_policy(folders[1], "tensor=1", ranks), 1)
    assert transport.begun == 3
    assert said("failed two publications; it is started again, and 0 times more at most")
    assert not {process.pid for process in before} & {process.pid for process in family(launcher)}
    assert distance(engine, folders[1]) <= 1e-5
    transport.abandon()
    engine.close()
