"""Faults between the trainer and a real server: repeated, named, and what is served after."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from megatron_efr.addresses import KEY
from megatron_efr.config import EnginesConfig, ModelConfig, TimeoutsConfig
from megatron_efr.errors import EngineError, UserError
from megatron_efr.rollout.build import sglang_engine
from megatron_efr.rollout.sglang.engine import SGLangEngine
from megatron_efr.rollout.sglang.server import Server
from megatron_efr.rollout.sglang.server_check import check_server
from megatron_efr.scripts import plain
from megatron_efr.types import Prompt, Sampling
from megatron_efr.weights.architecture import Architecture
from tests.conftest import VOCAB
from tests.engine.conftest import SLOTS, MakeSGLang
from tests.engine.published import distance
from tests.engine.test_parity import Models, weights_of
from tests.engine_contract import requests

FREE = Sampling(1.0, 1.0, 24, ())


class Wire:
    """A listener that passes bytes on to a server, and hangs up on the first `cuts` connections
    that ask for tokens.
    """

    def __init__(self, url: str, cuts: int) -> None:
        host, port = re.fullmatch(r"http://(.*):(\d+)", url).groups()  # pyright: ignore[reportOptionalMemberAccess]
        self._server, self.cuts, self.cut = (host, int(port)), cuts, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._server)
            threading.Thread(target=self._pass, args=(client, server), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        while True:
            try:
                data = source.recv(65536)
            except OSError:
                data = b""
            if b"POST /generate" in data and self.cut < self.cuts:
                self.cut += 1
                data = b""
            if not data:
                break
            target.sendall(data)
        for end in (source, target):
            end.close()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def wire(server: tuple[str, str]) -> Iterator[Wire]:
    made = Wire(server[0], cuts=3)
    yield made
    made.close()


def test_a_response_whose_connection_is_cut_is_asked_for_again(
    wire: Wire, make_engine: MakeSGLang, models: Models
) -> None:
    engine = make_engine(wire.url)
    engine.publish(weights_of(models[0]), version=1)
    asked = requests(6, samples=3)
    groups = list(engine.generate(asked, FREE))
    assert wire.cut == 3
    assert sorted(group.seed for group in groups) == [request.seed for request in asked]
    assert {len(group.responses) for group in groups} == {3}
    assert engine.health()["resent"] == 3


def test_a_limit_that_runs_out_is_named(make_engine: MakeSGLang, models: Models) -> None:
    engine = make_engine(limits=TimeoutsConfig(response_s=0.01))
    engine.publish(weights_of(models[0]), version=1)
    with pytest.raises(
        EngineError, match=r"prompt p0: lost 3 times: .*/generate.*rollout\.timeouts\.response_s"
    ):
        list(engine.generate(requests(1), FREE))
    assert len(list(make_engine_again(make_engine, models).generate(requests(2), FREE))) == 2


def make_engine_again(make_engine: MakeSGLang, models: Models) -> SGLangEngine:
    """Another engine over the same server, serving."""
    engine = make_engine()
    engine.publish(weights_of(models[0]), version=5)
    return engine


def test_nobody_listening_is_named(make_engine: MakeSGLang) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(EngineError, match=re.escape(url)):
        make_engine(url)


def test_a_wrong_key_is_refused(
    make_engine: MakeSGLang,
    server: tuple[str, str],
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(EngineError, match="401"):
        make_engine(key="another")
    monkeypatch.setenv(KEY, "another")
    engines = EnginesConfig(engine="sglang", urls=[server[0]])
    model, architecture = ModelConfig(path=str(folders[0])), Architecture.from_folder(folders[0])
    with (
        ExitStack() as stack,
        pytest.raises(UserError, match=rf"{server[0]}/.* 401: .* in rollout\.urls in {KEY}\?"),
    ):
        sglang_engine(model, architecture, engines, tmp_path, 0, str, stack)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"engine_ranks": 2}, "rollout.tp: 2, but {url} has --tp-size 1"),
        ({"dtype": "bfloat16"}, "{url} runs with --dtype float32, and model.dtype is bfloat16"),
        ({"routed_experts": True}, "{url} was started without --enable-return-routed-experts"),
    ],
)
def test_a_server_that_is_not_what_the_run_asks_for_is_refused(
    asked: dict[str, Any], why: str, server: tuple[str, str], folders: tuple[Path, Path]
) -> None:
    url, key = server
    with pytest.raises(UserError, match=re.escape(why.format(url=url))):
        SGLangEngine(
            [url], Architecture.from_folder(folders[0]), SLOTS, TimeoutsConfig(), key=key, **asked
        )


@pytest.mark.parametrize(
    ("started", "why"),
    [
        ({"dtype": "bfloat16"}, "--dtype bfloat16, and model.dtype is float32"),
        (
            {"dtype": "auto"},
            "--dtype auto, and model.dtype is .* start it with --dtype float32",
        ),
        ({"enable_custom_logit_processor": True}, "--enable-custom-logit-processor or"),
        ({"preferred_sampling_params": {"top_p": 0.9}}, "or --preferred-sampling-params"),
    ],
)
def test_arguments_that_would_change_what_log_probs_mean_are_refused(
    started: dict[str, Any], why: str, make_engine: MakeSGLang, server: tuple[str, str]
) -> None:
    engine = make_engine()
    (info,) = engine._all(Server.info)
    as_asked: dict[str, Any] = {"ranks": 1, "dtype": "float32", "routed_experts": False}
    check_server(server[0], info, **as_asked)
    check_server(server[0], info | {"dtype": "float"}, **as_asked)
    with pytest.raises(UserError, match=f"rollout.urls: {server[0]} runs with .*{why}"):
        check_server(server[0], info | started, **as_asked)


def test_a_server_in_bf16_needs_its_head_in_fp32(make_engine: MakeSGLang) -> None:
    (info,) = make_engine()._all(Server.info)
    info |= {"dtype": "bfloat16"}
    assert info["enable_fp32_lm_head"] is False
    as_asked: dict[str, Any] = {"ranks": 1, "dtype": "bfloat16", "routed_experts": False}
    with pytest.raises(
        UserError, match=r"logits in bfloat16 and the policy in float32.*--enable-fp32-lm-head"
    ):
        check_server("http://a:1", info, **as_asked)
    check_server("http://a:1", info | {"enable_fp32_lm_head": True}, **as_asked)


def test_an_id_outside_the_vocabulary_never_reaches_the_server(
    make_engine: MakeSGLang, models: Models
) -> None:
    engine = make_engine_again(make_engine, models)
    with pytest.raises(
        ValueError, match=f"prompt bad: a token is outside the model's vocabulary of {VOCAB}"
    ):
        list(engine.generate([plain(Prompt("bad", (3, VOCAB), "", ""), 1, 0)], FREE))
    with pytest.raises(ValueError, match="stop_ids"):
        engine.generate(requests(1), Sampling(1.0, 1.0, 4, (VOCAB,)))
    assert len(list(engine.generate(requests(2), FREE))) == 2


def test_after_a_publication_that_failed_nothing_is_served_until_one_succeeds(
    make_engine: MakeSGLang, models: Models
) -> None:
    engine = make_engine()
    engine.publish(weights_of(models[0]), version=1)
    whole = engine.checksums()
    stream = engine.generate(requests(40), FREE)
    groups = [next(stream)]

    def torn() -> Iterator:
        yield from weights_of(models[1])[:9]
        raise OSError("the gathering ended")

    engine.bucket_bytes = 20_000  # so that some of it was loaded
    with pytest.raises(OSError, match="the gathering ended"):
        engine.publish(torn(), version=2)
    assert engine.version == -1
    assert engine.checksums() != whole
    with pytest.raises(RuntimeError, match="publish"):
        next(stream)
    engine.publish(weights_of(models[0]), version=3)
    assert engine.checksums() == whole
    groups += stream  # what was unfinished was kept
    assert len(groups) == 40


def test_waiting_in_the_thread_that_paused_is_an_error(
    make_engine: MakeSGLang, models: Models
) -> None:
    engine = make_engine_again(make_engine, models)
    stream = engine.generate(requests(2), FREE)
    engine.pause()
    with pytest.raises(RuntimeError, match=r"paused: resume\(\)"):
        next(stream)
    engine.resume()
    assert len(list(stream)) == 2


def test_a_folder_that_the_server_cannot_see_is_named_and_one_that_it_sees_is_served(
    make_engine: MakeSGLang, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    engine = make_engine()
    with pytest.raises(
        EngineError,
        match=rf"(?s)answered 400: .*: disk the server must find {tmp_path}/absent on its",
    ):
        engine.publish_folder(tmp_path / "absent", version=1)
    assert engine.version == -1
    engine.publish_folder(folders[1], version=2)
    assert engine.version == 2
    assert distance(engine, folders[1]) <= 1e-5
