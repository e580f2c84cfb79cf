"""Addresses of servers: what is not reached is a sentence, before anything starts."""

from __future__ import annotations

import pytest

from megatron_efr.addresses import LOOPBACK, own_address, private_address
from megatron_efr.errors import UserError

pytestmark = pytest.mark.alike


def test_a_servers_address_is_found_in_any_url() -> None:
    for url in (f"http://{LOOPBACK}:1", f"http://{LOOPBACK}/engine", f"https://user@{LOOPBACK}:1"):
        assert own_address(url) == LOOPBACK


def test_a_host_that_nobody_knows_is_named() -> None:
    with pytest.raises(UserError, match=r"^no-such\.invalid: no such host is known here"):
        private_address("no-such.invalid")
    with pytest.raises(UserError, match=r"^rollout\.urls: http://no-such\.invalid:1 is not reach"):
        own_address("http://no-such.invalid:1")
