"""Addresses of servers: where they listen, who may reach them there, and if they answer."""

from __future__ import annotations

import ipaddress
import random
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from urllib.parse import urlsplit

from megatron_efr.errors import UserError

LOOPBACK = "127.0.0.1"
PORTS = range(20000, 30000)  # below those that the kernel gives to outgoing connections

KEY = "SGLANG_API_KEY"
"""Environment variable with the key of the servers in `rollout.urls`."""

# no proxy stands between a run's machines
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def private_address(host: str) -> str:
    """The IPv4 address of `host`; UserError if there is no such host, or the internet may reach
    it.
    """
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        raise UserError(f"{host}: no such host is known here: {error}") from error
    if not ipaddress.ip_address(address).is_private:
        raise UserError(
            f"{host}: {address} is a public address, and an engine must not be reachable from "
            "outside; give the machine's name or address on the private network"
        )
    return address


def address_towards(host: str) -> str:
    """The address of this machine from which it reaches `host`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        return probe.getsockname()[0]


def own_address(url: str) -> str:
    """The address of this machine at which the server at `url` reaches it; UserError if there is
    no such host.
    """
    try:
        return address_towards(urlsplit(url).hostname or "")
    except OSError as error:
        raise UserError(f"rollout.urls: {url} is not reached from here: {error}") from error


def kernels_port(host: str) -> int:
    """A port of this machine's address `host` that the kernel chooses among those that nobody
    listens on.
    """
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def free_port(host: str, ports: Sequence[int] = PORTS) -> int:
    """A port of this machine's address `host` that nobody listens on now."""
    for port in random.sample(ports, 100):
        with socket.socket() as candidate:
            try:
                candidate.bind((host, port))
            except OSError:
                continue
            return port
    raise UserError(f"no free port among 100 tried in {ports[0]}-{ports[-1]} on {host}")


def status(url: str, timeout_s: float, key: str | None = None) -> int | None:
    """The HTTP status that `url` answers with, None if it does not answer within `timeout_s`."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with _OPENER.open(request, timeout=timeout_s) as answer:
            answer.read()
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:  # refused, reset, or too late; URLError is one
        return None


def is_ready(url: str) -> bool:
    """True if the server takes requests."""
    return status(f"{url}/ready", timeout_s=5) == 200


def wait_until_ready(urls: Sequence[str], limit_s: float) -> None:
    """Wait for every server, wherever it is; UserError names those that do not answer within
    `limit_s` seconds.
    """
    end = time.monotonic() + limit_s
    while waiting := [url for url in urls if not is_ready(url)]:
        if time.monotonic() > end:
            raise UserError(
                f"no engine answers at {', '.join(waiting)} after rollout.timeouts.start_s = "
                f"{limit_s:g} s"
            )
        time.sleep(0.5)
