"""The network interface by which the hosts of a run reach each other."""

from __future__ import annotations

import socket

import psutil

from megatron_efr.addresses import address_towards
from megatron_efr.errors import UserError


def interface_towards(host: str) -> str:
    """This machine's interface by which it reaches `host`; UserError if there is none, or no such
    host.

    Not the one that its own name stands for: if that is 127.0.1.1, as Debian has it, gloo would
    take that address, at which no other host finds it.
    """
    try:
        address = address_towards(socket.gethostbyname(host))
    except OSError as error:
        raise UserError(f"--hosts: {host} is not reached from here: {error}") from error
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.family == socket.AF_INET and known.address == address for known in addresses):
            return name
    raise UserError(
        f"--hosts: {host} is reached from {address}, and no network interface of this machine has "
        "it"
    )
