"""Starts a module of the tests on several ranks.

The ranks are forked from one process that has imported Megatron-Core already: an import takes each
six seconds of CPU, and a fork none. They have the environment that torchrun gives. torchrun itself
starts the ranks of tests/loop and of tests/engine.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_S = 900

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["megatron_efr.train"])


def run_ranks(
    processes: int, module: str, *arguments: object, path: Path | None = None, check: bool = True
) -> None:
    """Run `python -m MODULE ARGUMENTS...` on every rank, one thread each, with `path` before the
    others to import from.

    The others are ended when one fails. AssertionError has the end of what the ranks said, unless
    they may fail (`check` false).
    """
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / str(rank) for rank in range(processes)]
        ranks = []
        for rank in range(processes):
            variables = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes,
                "LOCAL_WORLD_SIZE": processes,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1,
            }  # fmt: skip
            environment = os.environ | {name: str(value) for name, value in variables.items()}
            words = [module, *map(str, arguments)]
            ranks.append(_server.Process(target=_rank, args=(environment, words, path, said[rank])))
        codes = _run(ranks)
        if check:
            assert not any(codes), "\n".join(
                file.read_text()[-6000:] for file in said if file.exists()
            )


def _run(ranks: list[ForkServerProcess]) -> list[int | None]:
    """The exit codes, once all have ended; a failure, or LIMIT_S without an end, ends the
    others.
    """
    for rank in ranks:
        rank.start()
    running = {rank.sentinel: rank for rank in ranks}
    while running:
        ended = [
            running.pop(sentinel) for sentinel in running.keys() & set(wait(list(running), LIMIT_S))
        ]
        if not ended or any(rank.exitcode for rank in ended):
            for rank in running.values():
                rank.terminate()
    return [rank.exitcode for rank in ranks]


def _rank(environment: dict[str, str], words: list[str], path: Path | None, said: Path) -> None:
    with said.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= environment
    os.chdir(ROOT)
    sys.path[:0] = [str(path)] if path else []
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
