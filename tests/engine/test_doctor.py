"""Findings of `efr doctor` on real servers that run already, and of the router in their
interpreter.
"""

from __future__ import annotations

import socket

import pytest

from megatron_efr.doctor.engine import check_router, check_servers
from megatron_efr.rollout.sglang.router import PIN
from tests.engine.conftest import PYTHON, MakeSGLang
from tests.engine.test_parity import Models, weights_of


def test_a_server_that_answers_is_told_from_one_that_does_not_and_from_one_of_another_key(
    server: tuple[str, str], make_engine: MakeSGLang, models: Models
) -> None:
    url, key = server
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
        good, gone = check_servers([url + "/", nobody], key)
    assert (good.verdict, good.found) == ("ok", f"{url}/ answers")
    assert (gone.verdict, gone.found) == ("problem", f"{nobody}: no answer within 5 s")
    [other], [none] = check_servers([url], "other"), check_servers([url], None)
    assert (other.verdict, other.found) == ("problem", f"{url} refuses the key in SGLANG_API_KEY")
    assert (none.verdict, none.found) == (
        "problem",
        f"{url} requires a key, and SGLANG_API_KEY is not set",
    )
    engine = make_engine()
    engine.publish(weights_of(models[0]), version=1)
    engine.pause()
    [paused] = check_servers([url], key)
    assert paused.verdict == "ok", (
        "a killed trainer leaves servers paused, and a new one takes them into use"
    )
    engine.resume()


def test_the_router_of_the_engines_interpreter_is_the_pinned_one() -> None:
    found = check_router(str(PYTHON), PIN.partition("==")[2])
    if "no such interpreter" in found.found or "No module named 'sglang_router'" in found.found:
        pytest.skip(f"{found.found}: bash tools/setup_sglang_cpu.sh makes it")
    assert found.verdict == "ok"
