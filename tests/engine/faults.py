"""Servers of a test's own, to be killed, frozen and started again, and a wire on which one answers
with failures.
"""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from megatron_efr.addresses import wait_until_ready
from megatron_efr.config import TimeoutsConfig
from megatron_efr.rollout.sglang.engine import SGLangEngine
from megatron_efr.weights.architecture import Architecture
from tests.engine.conftest import SLOTS, rollout, start

LIMITS = TimeoutsConfig(connect_s=3, health_s=8, check_s=0.5, control_s=30, start_s=300)


class Servers:
    """Two servers of one model, each of which keeps its address whatever becomes of it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.model, self.config = model, rollout(engines=2)
        launcher, self.urls = start(folder, self.config, model)
        self.key, self._launcher, self._launched = launcher.key, launcher, launcher.servers

    def engine(self, *urls: str, limits: TimeoutsConfig = LIMITS) -> SGLangEngine:
        """An engine over both, or over `urls`."""
        return SGLangEngine(
            urls or self.urls, Architecture.from_folder(self.model), SLOTS, limits, key=self.key
        )

    def kill(self, *indices: int) -> None:
        """Nothing of them is left when this returns."""
        processes = [process for index in indices for process in self.processes(index)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for index in indices:
            self._launched[index].process.wait()
        psutil.wait_procs(processes, timeout=30)

    def revive(self) -> None:
        """Start those again that a test has left dead."""
        self.restart(
            *(index for index in range(2) if self._launched[index].process.poll() is not None)
        )

    def freeze(self, index: int) -> None:
        self._signal(index, signal.SIGSTOP)

    def thaw(self, index: int) -> None:
        self._signal(index, signal.SIGCONT)

    def restart(self, *indices: int) -> None:
        """Start killed servers at their addresses, without weights, and wait until they are
        ready.
        """
        for index in indices:
            self._launched[index].start()
        wait_until_ready([self.urls[index] for index in indices], self.config.timeouts.start_s)

    def close(self) -> None:
        self._launcher.close()

    def _signal(self, index: int, number: signal.Signals) -> None:
        for process in self.processes(index)[:-1]:
            process.send_signal(number)

    def processes(self, index: int) -> list[psutil.Process]:
        """All that a server runs, and at last its supervisor."""
        supervisor = psutil.Process(self._launched[index].process.pid)
        return [*supervisor.children(recursive=True), supervisor]


class Failing:
    """A wire to a server on which every request for tokens is answered with 500, and all others by
    the server.
    """

    def __init__(self, url: str) -> None:
        host, port = re.fullmatch(r"http://(.*):(\d+)", url).groups()  # pyright: ignore[reportOptionalMemberAccess]
        self._server, self.failed = (host, int(port)), 0
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
        while data := _received(source):
            if data.startswith(b"POST /generate"):
                self.failed += 1
                _receive_body(source, data)
                source.sendall(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")
            else:
                target.sendall(data)
        for end in (source, target):
            end.close()

    def close(self) -> None:
        self._listener.close()


def _received(source: socket.socket) -> bytes:
    try:
        return source.recv(65536)
    except OSError:
        return b""


def _receive_body(source: socket.socket, data: bytes) -> None:
    """Receive the rest of a request that begins with `data`."""
    head, _, body = data.partition(b"\r\n\r\n")
    left = int(re.findall(rb"(?i)content-length: *(\d+)", head)[0]) - len(body)
    while left > 0:
        left -= len(_received(source))


def wait_until(holds: Callable[[], bool], what: str, limit_s: float = 120) -> None:
    """Fails, naming `what`, if it does not come to hold in time."""
    end = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {limit_s} s"
        time.sleep(0.1)
