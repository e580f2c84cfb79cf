"""Watches servers from threads of its own, and starts again those that ended or hang, at their old
addresses.

It looks at processes and speaks HTTP, and never touches CUDA or a collective.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from megatron_efr import log
from megatron_efr.addresses import status
from megatron_efr.config import TimeoutsConfig
from megatron_efr.rollout.servers.process import ServerProcess

EVERY_S = 1.0
"""Between two looks at a server."""


class Watch:
    """A thread for each of `servers`, which are ready; each is started again `restarts` times at
    most, then stays down.

    A server hangs when its scheduler, which answers `/server_info` also while it is paused or
    asleep, has not for `limits.hang_s`; while weights are loaded into a paused one, for
    `limits.update_s` if that is longer.
    """

    def __init__(
        self, servers: Sequence[ServerProcess], key: str, limits: TimeoutsConfig, restarts: int
    ) -> None:
        self._key = key
        self._limits = limits
        self._restarts = restarts
        self._closed = threading.Event()
        self._allowed = threading.Event()
        self._lock = threading.Lock()
        self._allowed.set()
        self._servers = servers
        self._starting = set[ServerProcess]()
        self._ended: set[ServerProcess] = set()  # by `restart`
        self._threads = [
            threading.Thread(
                target=self._keep, args=(server,), name=f"watch {server.name}", daemon=True
            )
            for server in servers
        ]
        for thread in self._threads:
            thread.start()

    def hold(self) -> None:
        """Put restarts off until `allow`: when this returns no server is starting, and none will.

        One that was is ended; it is started again after `allow`, and this does not count as one of
        its times.
        """
        with self._lock:
            self._allowed.clear()
            for server in self._starting:
                server.end()
            self._starting.clear()

    def allow(self) -> None:
        """Start what was put off, and go on."""
        self._allowed.set()

    def restart(self, urls: Sequence[str]) -> None:
        """End those of the servers at `urls` that run; they are started again like others that
        ended.
        """
        with self._lock:
            for server in self._servers:
                if (
                    server.url in urls
                    and server not in self._starting
                    and server.process.poll() is None
                ):
                    self._ended.add(server)
                    server.end()

    def join(self) -> None:
        """Wait until every server is down for good."""
        for thread in self._threads:
            thread.join()

    def close(self) -> None:
        """Start nothing any more. The servers themselves are left as they are; end them, then
        `join`.
        """
        # a start that has begun is finished first, and is then seen by who ends the servers
        with self._lock:
            self._closed.set()

    def _keep(self, server: ServerProcess) -> None:
        """The thread of one server."""
        fault = self._watch(server)
        for left in reversed(range(self._restarts)):
            if fault is None:
                return
            self._end(server, fault, f"is started again, and {left} times more at most")
            fault = self._bring_back(server) or self._watch(server)
        if fault is not None:
            self._end(server, fault, f"stays down: rollout.restarts = {self._restarts}")

    def _watch(self, server: ServerProcess) -> str | None:
        """Look at a running server until something is wrong with it: what, or None once closed."""
        answered = excused = time.monotonic()
        while not self._closed.wait(EVERY_S):
            if (code := server.process.poll()) is not None:
                refused = server in self._ended
                self._ended.discard(server)
                return self._unless_closed(
                    "failed two publications" if refused else f"ended with exit code {code}"
                )
            if self._answers(server):
                answered = excused = time.monotonic()
            elif self._paused(server):
                excused = time.monotonic()
            for name, since in (("hang_s", excused), ("update_s", answered)):
                limit = max(self._limits.hang_s, getattr(self._limits, name))
                if time.monotonic() - since >= limit:
                    return self._unless_closed(
                        f"hangs: no answer for rollout.timeouts.{name} = {limit:g} s"
                    )
        return None

    def _answers(self, server: ServerProcess) -> bool:
        patience = min(self._limits.health_s, self._limits.hang_s)
        return status(f"{server.url}/server_info", patience, self._key) == 200

    def _paused(self, server: ServerProcess) -> bool:
        """As the web process knows it, whatever the scheduler is doing."""
        patience = min(self._limits.health_s, self._limits.hang_s)
        return (
            status(f"{server.url}/ready", patience) == 503
            and status(f"{server.url}/ping", patience, self._key) == 200
        )

    def _end(self, server: ServerProcess, fault: str, then: str) -> None:
        server.end()
        log.warning(f"{server.name} at {server.url} {fault}; it {then}; {server.tail()}")

    def _bring_back(self, server: ServerProcess) -> str | None:
        """Start a server that has ended, when that is allowed: what went wrong, or None when it is
        ready, or closed.
        """
        while self._start(server):
            fault = self._until_ready(server)
            with self._lock:
                put_off = server not in self._starting  # by `hold`, which ended it
                self._starting.discard(server)
            if not put_off:
                return fault
        return None

    def _start(self, server: ServerProcess) -> bool:
        """Wait until it is allowed, and start; False once closed."""
        while not self._closed.is_set():
            if self._allowed.wait(EVERY_S):
                with self._lock:
                    if self._allowed.is_set() and not self._closed.is_set():
                        server.start()
                        self._starting.add(server)
                        return True
        return False

    def _until_ready(self, server: ServerProcess) -> str | None:
        began = time.monotonic()
        while not self._closed.wait(EVERY_S):
            if (code := server.process.poll()) is not None:
                return self._unless_closed(f"ended with exit code {code} before it was ready")
            if server.made_ready(self._key):
                log.info(f"{server.name} is back at {server.url}")
                return None
            if time.monotonic() - began > self._limits.start_s:
                return f"is not ready after rollout.timeouts.start_s = {self._limits.start_s:g} s"
        return None

    def _unless_closed(self, fault: str) -> str | None:
        """A server that is ended at the end of a run has no fault."""
        return None if self._closed.is_set() else fault
