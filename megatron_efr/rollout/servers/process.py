"""One SGLang server as a process under its supervisor: started, ended, and started again at the
same address.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_efr.addresses import is_ready, status
from megatron_efr.rollout.servers import supervisor

TAIL = 20  # lines of a log that an error shows
CONTROL_S = 10.0  # for a server to freeze what its garbage collector looks at
GRACE_S = 10.0  # what a supervisor gets beyond the server's stop_s


class ServerProcess:
    """A server at `url`. Each start has a log of its own: NAME.log, NAME.1.log, NAME.2.log, ... in
    `folder`.
    """

    def __init__(
        self,
        name: str,
        url: str,
        folder: Path,
        command: Sequence[str],
        environment: Mapping[str, str],
        stop_s: float,
    ) -> None:
        self.name = name
        self.url = url
        self.log = folder / f"{name}.log"
        self._command = list(command)
        self._environment = dict(environment)
        self._stop_s = stop_s
        self._starts = 0
        self.start()

    def start(self) -> None:
        """Start it, in a session of its own; what ran before must have ended. Returns before it is
        ready.
        """
        if self._starts:
            self.log = self.log.with_name(f"{self.name}.{self._starts}.log")
        watched = [
            sys.executable,
            "-I",
            supervisor.__file__,
            str(os.getpid()),
            str(self._stop_s),
            *self._command,
        ]
        with open(self.log, "wb") as output:
            self.process = subprocess.Popen(
                watched,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        self._starts += 1

    def made_ready(self, key: str) -> bool:
        """True if it takes requests. It is told then to have its garbage collector pass by what its
        start has left.

        SGLang does that itself, but before it listens if it skips its warm-up (0.5.23), and in
        vain. Each flush of its caches then takes 0.4 s on a CPU: there it collects garbage.
        """
        if not is_ready(self.url):
            return False
        status(f"{self.url}/freeze_gc", CONTROL_S, key)
        return True

    def terminate(self) -> None:
        """Have its supervisor end it and all that it started; a supervisor that was stopped goes on
        for that.
        """
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()

    def wait(self) -> None:
        """After `terminate`: until nothing is left of it."""
        try:
            self.process.wait(self._stop_s + GRACE_S)
        except subprocess.TimeoutExpired:
            # the kernel kills the server with its supervisor, and SGLang's workers with it
            self.process.kill()
            self.process.wait()

    def end(self) -> None:
        """End it, and wait until nothing is left of it."""
        self.terminate()
        self.wait()

    def tail(self) -> str:
        """The place of its log, and the end of it, without the line that holds the key."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        shown = [line[:500] for line in lines[-TAIL:] if "server_args=" not in line]
        return "\n  ".join([f"the end of {self.log}:", *shown])
