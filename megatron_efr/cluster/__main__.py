"""Start this host's part of a run: `python -m megatron_efr.cluster CONFIG --hosts a,b --gpus 8 --host a`.

--dry-run          print every host's placement, commands and environment, and start nothing
--only engines     the engines alone, or `trainer`
--print engines    the hosts of engines that no rank is on (`trainer`: the trainer's), for a script
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from megatron_efr.arguments import run
from megatron_efr.cluster.commands import UNSET, Command, commands, describe
from megatron_efr.cluster.placement import RENDEZVOUS_PORT, Placement, place
from megatron_efr.cluster.serve import KEY
from megatron_efr.config import TrainConfig
from megatron_efr.configfile import load
from megatron_efr.errors import UserError
from megatron_efr.interruption import SIGNALS


def start(chosen: Sequence[Command], placement: Placement, limit_s: float) -> int:
    """Start a host's processes, the trainer once all engines are ready; its exit code, or the first engine's."""
    environment = {name: value for name, value in os.environ.items() if name not in UNSET}
    environment.setdefault(KEY, secrets.token_urlsafe(32))
    engines = [command for command in chosen if command.what != "trainer"]
    with _children(only_engines=len(engines) == len(chosen)) as children:
        for command in engines:
            children.append(subprocess.Popen(command.words, env=environment | dict(command.environment)))
        if len(engines) == len(chosen):
            return _first_end(children)
        wait_until_ready([engine.url for engine in placement.engines], limit_s, children)
        [command] = [command for command in chosen if command.what == "trainer"]
        trainer = subprocess.Popen(command.words, env=environment | dict(command.environment))
        for number in SIGNALS:
            signal.signal(number, lambda number, _: trainer.send_signal(number))
        code = trainer.wait()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # the answer stands; engines are still to be ended
        return code


@contextmanager
def _children(only_engines: bool) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that are ended with this one, however it ends short of SIGKILL (their supervisors see to that)."""
    children: list[subprocess.Popen[bytes]] = []

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN if only_engines else leave)
    try:
        yield children
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.wait()


def _first_end(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until one of them ends: its exit code."""
    while True:
        for child in children:
            if (code := child.poll()) is not None:
                return code
        time.sleep(0.5)


def wait_until_ready(urls: Sequence[str], limit_s: float, children: Sequence[subprocess.Popen[bytes]] = ()) -> None:
    """Wait for every engine, wherever it is; UserError names those that do not answer within `limit_s` seconds."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    waiting, end = list(urls), time.monotonic() + limit_s
    while waiting:
        for url in list(waiting):
            try:
                with opener.open(f"{url}/ready", timeout=5) as answer:
                    if answer.status == 200:
                        waiting.remove(url)
            except (urllib.error.URLError, OSError):
                continue
        if any(child.poll() is not None for child in children):
            raise UserError("an engine of this host ended before it was ready; its message is above")
        if waiting and time.monotonic() > end:
            raise UserError(f"no engine answers at {', '.join(waiting)} after rollout.timeouts.start_s = {limit_s:g} s")
        time.sleep(0.5 if waiting else 0)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m megatron_efr.cluster", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--hosts", required=True, help="every host of the run, with commas, by their private names")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of each host")
    parser.add_argument("--host", help="the one of them that this is; needed to start anything")
    parser.add_argument("--port", type=int, default=RENDEZVOUS_PORT, help="of torchrun's rendezvous on the first host")
    parser.add_argument("--only", choices=["engines", "trainer"])
    parser.add_argument("--print", choices=["engines", "trainer"], dest="hosts_of")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_intermixed_args(argv)
    config = load(TrainConfig, given.config, given.overrides)
    placement = place(given.hosts.split(","), given.gpus, config.rollout, given.port)
    if given.only != "engines":
        config.check_world(len(placement.ranks))
    if given.hosts_of is not None:
        trainer = set(placement.trainer_hosts)
        print(",".join(host for host in placement.hosts if (host in trainer) == (given.hosts_of == "trainer")))
        return
    every = list(commands(placement, given.config, given.overrides, config.name.replace("/", "-")))
    chosen = [c for c in every if given.only is None or (c.what == "trainer") == (given.only == "trainer")]
    if given.dry_run:
        print("\n".join([*describe(placement), *(f"{command.host}$ {command}" for command in chosen)]))
        return
    if given.host not in placement.hosts:
        raise UserError(f"--host {given.host}: not one of the run's hosts, {', '.join(placement.hosts)}")
    mine = [command for command in chosen if command.host == given.host]
    sys.exit(start(mine, placement, config.rollout.timeouts.start_s) if mine else 0)


if __name__ == "__main__":
    run(main)
