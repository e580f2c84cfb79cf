"""Faults of real servers: killed, frozen, failing, started again without weights; every response
comes back once.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from megatron_efr.data.arithmetic import ArithmeticTask, write
from megatron_efr.errors import EngineError, LostError, NoEngineError
from megatron_efr.policy.ranks import Ranks
from megatron_efr.publication.sglang_layout import EngineLayout
from megatron_efr.publication.transports import Broadcast, InBand
from megatron_efr.rollout.recovery import take_in_returned
from megatron_efr.rollout.sglang.engine import SGLangEngine
from megatron_efr.run.folder import RunFolder
from megatron_efr.types import Group, Sampling
from megatron_efr.weights.architecture import Architecture
from tests.engine.conftest import STOP
from tests.engine.faults import LIMITS, Failing, Servers, wait_until
from tests.engine.published import distance, make_policy, make_publisher
from tests.engine.test_parity import Models, weights_of
from tests.engine_contract import requests
from tests.loop.conftest import install_method

LONG = Sampling(1.0, 1.0, 300, (STOP,))
COUNT = 150


@pytest.fixture
def engine(servers: Servers, models: Models) -> Iterator[SGLangEngine]:
    """Over both servers, which serve the first model as version 1."""
    servers.revive()
    made = servers.engine()
    made.publish(weights_of(models[0]), version=1)
    made.health()
    yield made
    made.close()


def assert_each_came_once(groups: list[Group], version: int) -> None:
    assert sorted(group.seed for group in groups) == [request.seed for request in requests(COUNT)]
    responses = [response for group in groups for response in group.responses]
    assert len(responses) == 2 * COUNT
    assert {span.version for response in responses for span in response.versions} == {version}


def figures(engine: SGLangEngine) -> tuple[float, float, float]:
    """(serving, lost, back)"""
    health = engine.health()
    return health["serving"], health["lost"], health["back"]


def test_a_server_killed_in_generation_loses_no_response_and_serves_again_only_when_published_to(
    servers: Servers, engine: SGLangEngine, models: Models
) -> None:
    stream = engine.generate(requests(COUNT), LONG)
    groups = [next(stream)]
    servers.kill(0)
    groups += stream
    assert_each_came_once(groups, 1)
    health = engine.health()
    assert (health["serving"], health["lost"], health["back"]) == (1, 1, 0)
    assert health["resent"] > 0
    servers.restart(0)
    # of version 1, which the other has alone
    assert_each_came_once(list(engine.generate(requests(COUNT), LONG)), 1)
    assert figures(engine) == (1, 0, 0)
    # as an evaluation does
    take_in = take_in_returned(engine, lambda: engine.publish(weights_of(models[0]), version=2))
    wait_until(lambda: take_in() or engine.count == 2, "the restarted server takes part")
    assert engine.checksums()[0] == engine.checksums()[1]
    assert distance(engine, servers.model) <= 1e-5
    assert figures(engine) == (2, 0, 1)


def back_in(engine: SGLangEngine, models: Models) -> bool:
    """Publish, as an iteration would; whether both servers take part."""
    engine.publish(weights_of(models[0]), version=2)
    return engine.count == 2


@pytest.mark.slow
def test_a_server_that_restarts_empty_between_health_checks_is_found_out_by_its_answers(
    servers: Servers, models: Models, capfd: pytest.CaptureFixture[str]
) -> None:
    servers.revive()
    engine = servers.engine(limits=LIMITS.model_copy(update={"check_s": 1000.0}))
    engine.publish(weights_of(models[0]), version=1)
    servers.kill(0)
    servers.restart(0)
    assert figures(engine) == (2, 0, 0)  # nobody has looked
    assert_each_came_once(list(engine.generate(requests(COUNT), LONG)), 1)
    assert figures(engine) == (1, 1, 0)
    assert (
        f"{servers.urls[0]} is lost: it has restarted, with weights 'default' and not '1'"
    ) in capfd.readouterr().err
    engine.close()


def test_a_frozen_server_is_found_out_and_what_waits_for_it_is_asked_of_another(
    servers: Servers, engine: SGLangEngine, models: Models
) -> None:
    stream = engine.generate(requests(COUNT), LONG)
    groups = [next(stream)]
    servers.freeze(1)
    try:
        groups += stream  # by health checks: the limit of a response is four hours
        assert_each_came_once(groups, 1)
        assert figures(engine) == (1, 1, 0)
        engine.publish(weights_of(models[0]), version=2)
        assert engine.urls == servers.urls[:1]
    finally:
        servers.thaw(1)
    assert_each_came_once(list(engine.generate(requests(COUNT), LONG)), 2)
    wait_until(lambda: back_in(engine, models), "the thawed server takes part")
    assert figures(engine) == (2, 0, 1)


def test_a_server_that_answers_500_is_passed_over(servers: Servers, models: Models) -> None:
    servers.revive()
    wire = Failing(servers.urls[0])
    engine = servers.engine(wire.url, servers.urls[1])
    engine.publish(weights_of(models[0]), version=3)
    assert_each_came_once(list(engine.generate(requests(COUNT), LONG)), 3)
    assert wire.failed > 0
    assert figures(engine) == (1, 1, 0)
    engine.publish(weights_of(models[0]), version=4)
    assert figures(engine) == (2, 0, 1)  # it answers: whether it still fails, a response will tell
    engine.close()
    wire.close()


class Killing(InBand):
    """Kills a server after the first publication's, or the given, number of buckets."""

    def __init__(self, engine: SGLangEngine, servers: Servers, index: int) -> None:
        super().__init__(engine)
        self.delivered, self._servers, self._index = 0, servers, index

    def deliver(self, prepared: Any) -> None:
        super().deliver(prepared)
        self.delivered += 1
        if self.delivered == 2:
            self._servers.kill(self._index)


def test_a_server_killed_in_a_publication_is_left_out_of_it_and_generation_goes_on(
    servers: Servers,
    engine: SGLangEngine,
    folders: tuple[Path, Path],
    ranks: Ranks,
    capfd: pytest.CaptureFixture[str],
) -> None:
    layout, policy = (
        EngineLayout(Architecture.from_folder(folders[0]), 1),
        make_policy(folders[1], "tensor=1", ranks),
    )
    stream = engine.generate(requests(COUNT), LONG)
    groups = [next(stream)]
    killing = Killing(engine, servers, 0)
    publisher = make_publisher(killing, engine, layout, ranks)
    publisher.publish(policy, 2)
    assert killing.delivered > 4  # all was sent again
    assert engine.urls == servers.urls[1:]
    groups += stream
    assert sorted(group.seed for group in groups) == [request.seed for request in requests(COUNT)]
    assert distance(engine, folders[1]) <= 1e-5
    assert f"without {servers.urls[0]} (lost)" in capfd.readouterr().err
    servers.restart(0)
    wait_until(
        lambda: publisher.publish(policy, 3) or engine.count == 2, "the restarted server takes part"
    )
    assert engine.checksums()[0] == engine.checksums()[1]


def test_no_rank_makes_a_handle_that_no_engine_will_open(
    servers: Servers, folders: tuple[Path, Path]
) -> None:
    """torch would keep its bucket for ever. Here, on a CPU, what takes the handle's place is
    counted.
    """
    servers.revive()
    victims = ",".join(str(process.pid) for process in servers.processes(1))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
    ]
    done = subprocess.run(
        [*command, "tests.engine.handed", str(folders[1]), ",".join(servers.urls), victims],
        cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1",
            "SGLANG_API_KEY": servers.key},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["version"] == 1
    # three, of which the last failed; then all, without its server
    assert said["made"] == [3 + said["buckets"], 3]


@pytest.mark.slow
def test_a_process_group_is_made_anew_where_its_servers_change(
    servers: Servers, engine: SGLangEngine, folders: tuple[Path, Path], ranks: Ranks
) -> None:
    layout, policy = (
        EngineLayout(Architecture.from_folder(folders[0]), 1),
        make_policy(folders[1], "tensor=1", ranks),
    )
    broadcast = Broadcast(engine, "127.0.0.1", "gloo", 120)
    publisher = make_publisher(broadcast, engine, layout, ranks)
    publisher.publish(policy, 2)
    publisher.publish(policy, 3)
    assert engine.count == 2
    servers.kill(1)
    publisher.publish(policy, 4)
    assert engine.urls == servers.urls[:1]
    assert distance(engine, folders[1]) <= 1e-5
    servers.restart(1)
    wait_until(
        lambda: publisher.publish(policy, 5) or engine.count == 2, "the restarted server takes part"
    )
    assert engine.checksums()[0] == engine.checksums()[1]
    broadcast.abandon()


class Faulty:
    """The receiving of an engine's second bucket: a `fault` befalls a server once all wait in the
    broadcast.
    """

    def __init__(self, engine: SGLangEngine, fault: Callable[[], None]) -> None:
        self._receive, self._fault = engine.update_from_distributed, fault
        self._buckets, self._since = 0, 0.0

    def __call__(self, *bucket: Any) -> Future[None]:
        receiving = self._receive(*bucket)
        self._buckets += 1
        if self._buckets == 2:
            time.sleep(1)
            self._fault()
            self._since = time.monotonic()
        return receiving

    def seconds(self) -> float:
        """Since the fault."""
        return time.monotonic() - self._since


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_server_killed_in_a_broadcast_leaves_the_other_alive_to_be_sent_everything_again(
    index: int,
    servers: Servers,
    engine: SGLangEngine,
    folders: tuple[Path, Path],
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout, policy = (
        EngineLayout(Architecture.from_folder(folders[0]), 1),
        make_policy(folders[1], "tensor=1", ranks),
    )
    broadcast = Broadcast(engine, "127.0.0.1", "gloo", LIMITS.update_s)
    faulty = Faulty(engine, lambda: servers.kill(index))
    monkeypatch.setattr(engine, "update_from_distributed", faulty)
    make_publisher(broadcast, engine, layout, ranks).publish(policy, 2)
    # one that stayed in the broadcast would be lost after `health_s` = 8
    assert faulty.seconds() < 6
    assert engine.urls == [servers.urls[1 - index]]
    assert figures(engine) == (1, 1, 0)
    assert distance(engine, folders[1]) <= 1e-5
    broadcast.abandon()


@pytest.mark.slow
def test_a_server_frozen_in_a_broadcast_is_left_out_after_its_limit_and_takes_part_once_thawed(
    servers: Servers, folders: tuple[Path, Path], ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers.revive()
    limits = LIMITS.model_copy(update={"update_s": 10.0})
    engine = servers.engine(limits=limits)
    layout, policy = (
        EngineLayout(Architecture.from_folder(folders[0]), 1),
        make_policy(folders[1], "tensor=1", ranks),
    )
    broadcast = Broadcast(engine, "127.0.0.1", "gloo", limits.update_s)
    publisher = make_publisher(broadcast, engine, layout, ranks)
    faulty = Faulty(engine, lambda: servers.freeze(0))
    monkeypatch.setattr(engine, "update_from_distributed", faulty)
    try:
        publisher.publish(policy, 1)
        # found out, and asked once more
        assert faulty.seconds() < limits.update_s + limits.health_s + 6
        assert engine.urls == servers.urls[1:]
        assert figures(engine) == (1, 1, 0)
        assert distance(engine, folders[1]) <= 1e-5
    finally:
        servers.thaw(0)
    wait_until(
        lambda: publisher.publish(policy, 2) or engine.count == 2, "the thawed server takes part"
    )
    assert engine.checksums()[0] == engine.checksums()[1]
    assert figures(engine) == (2, 0, 1)
    broadcast.abandon()
    engine.close()


@pytest.mark.slow
def test_with_no_server_left_generation_breaks_off_and_a_publication_waits_for_one(
    servers: Servers, engine: SGLangEngine, models: Models
) -> None:
    stream = engine.generate(requests(COUNT), LONG)
    groups = [next(stream)]
    servers.kill(0, 1)
    with pytest.raises(NoEngineError, match="none of 2 servers is left that serves version 1"):
        groups += stream
    with pytest.raises(LostError, match=servers.urls[0]):
        servers.engine()
    servers.restart(0, 1)
    engine.publish(weights_of(models[0]), version=1)
    assert_each_came_once(list(engine.generate(requests(COUNT), LONG)), 1)


def test_a_publication_to_none_gives_up_after_its_limit(servers: Servers, models: Models) -> None:
    servers.revive()
    engine = servers.engine(limits=LIMITS.model_copy(update={"start_s": 2.0}))
    servers.freeze(0)
    servers.freeze(1)
    try:
        with pytest.raises(
            EngineError, match=r"no engine has come back within rollout\.timeouts\.start_s = 2 s"
        ):
            engine.publish(weights_of(models[0]), version=1)
    finally:
        servers.thaw(0)
        servers.thaw(1)
    engine.publish(weights_of(models[0]), version=2)
    engine.close()


# -- a whole run
# --------------------------------------------------------------------------------------------------

CONFIG = """
name: faults
runs: {place}
seed: 5
model: {{path: {model}}}
data: {{datasets: [{{path: {place}/task/train.jsonl}}], prompt: {{template: "{{question}}"}}}}
rollout:
  {{engine: sglang, urls: {urls}, prompts: 24, samples: 4, max_new_tokens: 200, slots: 32, async: {overlap},
   timeouts: {{connect_s: 3, health_s: 8, check_s: 0.5}}}}
method: {{name: typical}}
algorithm: {{beta: 0.0}}
optimizer: {{lr: 1e-4}}
train: {{iterations: 4}}
checkpoint: {{every: 4}}
observe: {{tensorboard: false}}
"""


@pytest.fixture
def start_run(servers: Servers, tmp_path: Path) -> Callable[[bool], subprocess.Popen[str]]:
    """Starts a run of two ranks over the two servers; its folder is `tmp_path`/faults."""
    write(
        tmp_path / "task", 0, ArithmeticTask(max_terms=3, train_rows=160, test_rows=16, sft_rows=64)
    )
    model = tmp_path / "model"
    shutil.copytree(tmp_path / "task/model", model, ignore=shutil.ignore_patterns("*config.json"))
    shutil.copy(tmp_path / "task/model/tokenizer_config.json", model)
    shutil.copytree(servers.model, model, dirs_exist_ok=True)
    install_method(tmp_path)

    def run(overlap: bool) -> subprocess.Popen[str]:
        settings = {
            "place": tmp_path,
            "model": model,
            "urls": json.dumps(servers.urls),
            "overlap": str(overlap).lower(),
        }
        (tmp_path / "config.yaml").write_text(CONFIG.format(**settings))
        paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
             "-m", "megatron_efr.train", str(tmp_path / "config.yaml")],
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths),
                "SGLANG_API_KEY": servers.key},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    "overlap", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["synchronous", "async"]
)
def test_a_run_whose_servers_all_die_in_mid_generation_goes_on_where_it_was(
    overlap: bool,
    servers: Servers,
    start_run: Callable[[bool], subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    servers.revive()
    run, folder = start_run(overlap), RunFolder(tmp_path / "faults")
    try:
        journal = folder.journal(2).path
        wait_until(
            lambda: journal.exists() or run.poll() is not None,
            "the second iteration's first group",
            900,
        )
        servers.kill(0, 1)
        servers.restart(0, 1)
        said = run.communicate(timeout=900)[0]
    finally:
        run.kill()
    assert run.returncode == 0, said
    # in whichever came first, a prompt or a publication
    assert (
        "none of 2 servers is left that serves version" in said
        or "no engine answers: waiting up to" in said
    )
    groups = {step: [each.group for each in folder.read_rollouts(step)] for step in range(1, 5)}
    assert [len(taken) for taken in groups.values()] == [24] * 4
    assert len({group.seed for taken in groups.values() for group in taken}) == 96
    assert {len(group.responses) for taken in groups.values() for group in taken} == {4}
    lines = folder.read_metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert sum(line["engine/lost"] for line in lines) == 2
    back = sum(line["engine/back"] for line in lines)
    assert 1 <= back <= 2, "the second may start after the last publication"
    assert lines[-1]["engine/serving"] == back
    for step, line in enumerate(lines, start=1):
        assert line["first_ratio_max"] == 1
        spans = [
            span
            for group in groups[step]
            for response in group.responses
            for span in response.versions
        ]
        assert {step - 1 - span.version for span in spans} <= ({0, 1} if overlap else {0})
