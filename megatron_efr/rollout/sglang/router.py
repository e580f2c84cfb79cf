"""sglang-router 0.3.2 before a run's servers: its process, and its own calls over HTTP.

It sends a prompt to the server that has its beginning cached, unless that server has much more in
work than another. Here it checks no server's health, repeats nothing and shuts nobody out: that is
for those who know the weights' versions.
"""

from __future__ import annotations

import math
import os
import subprocess
from pathlib import Path
from typing import Any

from megatron_efr.addresses import KEY, LOOPBACK, free_port
from megatron_efr.config import EnginesConfig
from megatron_efr.errors import UserError
from megatron_efr.rollout.servers.launcher import server_environment
from megatron_efr.rollout.servers.process import ServerProcess
from megatron_efr.rollout.sglang.server import Server

PIN = "sglang-router==0.3.2"

MAIN = f"""
import os, sys
from sglang_router.launch_router import launch_router, parse_router_args
key = os.environ.pop("{KEY}", None)
launch_router(parse_router_args([*sys.argv[1:], *(["--api-key", key] if key else [])]))
"""
"""The program that its interpreter runs: the key comes by the environment, since `ps` shows
arguments.
"""

POLICY = {
    "policy": "cache_aware",
    "cache-threshold": 0.8,  # prompts share a template, and shall not all go to one server
    "balance-abs-threshold": 16,  # responses by which the busiest server may be ahead of the idlest
    "balance-rel-threshold": 1.1,
}


def start_router(rollout: EnginesConfig, folder: Path, key: str | None) -> ServerProcess:
    """Start it on this machine's own address, with no server behind it; its log is in `folder`.
    Returns before it is ready. UserError if `rollout.python` has it not.
    """
    outer = {
        name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")
    }
    # no proxy stands between a run's machines
    environment = server_environment(outer, on_gpu=True, tp=1)
    # it must be importable there
    found = subprocess.run(
        [rollout.python, "-c", "import sglang_router.launch_router"],
        env=environment,
        capture_output=True,
        text=True,
    )
    if found.returncode:
        said = found.stderr.strip().splitlines()[-1:]
        raise UserError(
            f"rollout.router: {rollout.python} cannot import sglang_router ({''.join(said)}); "
            f"install it by `{rollout.python} -m pip install --no-deps {PIN}`, or leave router out"
        )
    # prefix caching decides; health and repetition stay with the run
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port(LOOPBACK)
    options: dict[str, object] = POLICY | {
        "host": LOOPBACK,
        "port": port,
        "prometheus-host": LOOPBACK,
        "prometheus-port": free_port(LOOPBACK),
        "request-timeout-secs": math.ceil(rollout.timeouts.response_s),
        "shutdown-grace-period-secs": 1,
        "log-level": "warn",
    }
    # as a process under the supervisor, like servers
    switches = ("--disable-retries", "--disable-circuit-breaker", "--disable-health-check")
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [rollout.python, "-c", MAIN, *arguments, *switches]
    environment |= {KEY: key} if key else {}
    return ServerProcess(
        "router", f"http://{LOOPBACK}:{port}", folder, command, environment, rollout.timeouts.stop_s
    )


class Router(Server):
    """The router, which generates as a server does; its workers are the servers that it chooses
    from.
    """

    async def workers(self) -> dict[str, str]:
        """Their addresses, and the router's names for them. A single attempt: it also shows that
        the router lives.
        """
        answered = await self._request("GET", "/workers", None, "health_s")
        return {worker["url"]: worker["id"] for worker in answered["workers"]}

    async def add(self, url: str, key: str | None) -> None:
        """Have it take in a server, which it does once the server has generated a token; returns at
        once.
        """
        body: dict[str, Any] = {"url": url, "disable_health_check": True}
        await self._post("/workers", body | ({"api_key": key} if key else {}), "health_s")

    async def remove(self, name: str) -> None:
        """Have it leave out a server, by its name for it; what that server is generating is not
        ended.
        """
        await self._request("DELETE", f"/workers/{name}", None, "health_s")
