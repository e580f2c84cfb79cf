"""Start this host's part of a run: `python -m megatron_efr.cluster CONFIG --hosts a,b --gpus 8
--host a`.

A host with ranks becomes torchrun, whose first rank starts the engines beside them; the others get
engines alone.

--dry-run          print every host's placement, commands and environment, and start nothing
--print engines    the hosts that have engines alone (`trainer`: those with ranks), for a script
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

from megatron_efr.arguments import PORTS, run, within
from megatron_efr.cluster.commands import Command, commands, describe, over
from megatron_efr.cluster.network import interface_towards
from megatron_efr.cluster.placement import RENDEZVOUS_PORT, place, place_engines
from megatron_efr.config import TrainConfig
from megatron_efr.config.file import load
from megatron_efr.config.page import first_sentence
from megatron_efr.errors import UserError


def start(chosen: Sequence[Command]) -> int:
    """Become this host's trainer, or keep its engines running: the exit code, once all of them stay
    down.
    """
    if chosen[0].what == "trainer":
        os.execve(chosen[0].words[0], chosen[0].words, chosen[0].within(os.environ))
    children: list[subprocess.Popen[bytes]] = []
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    # SLURM sends it to all, and the iteration at hand needs the engines
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        for command in chosen:
            children.append(subprocess.Popen(command.words, env=command.within(os.environ)))
        return max(child.wait() for child in children)  # if one stays down the others go on
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.wait()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_efr.cluster", description=first_sentence(__doc__ or "")
    )
    # the run, as `efr train` takes it
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    # the hosts that it is spread over, and which of them this is
    parser.add_argument(
        "--hosts",
        required=True,
        help="every host of the run, with commas, by their private names",
    )
    parser.add_argument("--gpus", type=within(int, 1), default=8, help="GPUs of each host")
    parser.add_argument("--host", help="this host's name among them; needed to start anything")
    parser.add_argument(
        "--port",
        type=within(int, *PORTS),
        default=RENDEZVOUS_PORT,
        help="of torchrun's rendezvous on the first host",
    )
    # what to start, or to print instead
    parser.add_argument(
        "--only-engines",
        action="store_true",
        help="engines on every GPU; the trainer is elsewhere",
    )
    parser.add_argument(
        "--print",
        choices=["engines", "trainer"],
        dest="hosts_of",
        help="print the hosts of engines alone, or of the trainer, and end",
    )
    parser.add_argument("--dry-run", action="store_true", help="print each host's commands and end")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    given = _parser().parse_intermixed_args(argv)
    # placement of ranks and engines
    config = load(TrainConfig, given.config, given.overrides)
    hosts = given.hosts.split(",")
    if given.only_engines:
        placement = place_engines(hosts, given.gpus, config.rollout)
    else:
        placement = place(hosts, given.gpus, config.rollout, given.port)
        config.check_world(len(placement.ranks))
    # launch scripts ask for the hosts of one kind
    if given.hosts_of is not None:
        trainer = set(placement.trainer_hosts)
        print(
            ",".join(
                host
                for host in placement.hosts
                if (host in trainer) == (given.hosts_of == "trainer")
            )
        )
        return
    # what each host starts; this one also says by which interface others reach it
    every = list(commands(placement, given.config, given.overrides, config.name.replace("/", "-")))
    if others := [
        host for host in placement.hosts if host != given.host and given.host in placement.hosts
    ]:
        meeting = over(interface_towards(others[0]))
        every = [
            replace(c, defaults={**c.defaults, **meeting}) if c.host == given.host else c
            for c in every
        ]
    # print it, or start this host's part
    if given.dry_run:
        print(
            "\n".join([*describe(placement), *(f"{command.host}$ {command}" for command in every)])
        )
        return
    # asked for last: whoever only prints the plan is on none of the hosts
    if given.host not in placement.hosts:
        raise UserError(
            f"--host {given.host}: not one of the run's hosts, {', '.join(placement.hosts)}"
        )
    sys.exit(start([command for command in every if command.host == given.host]))


if __name__ == "__main__":
    run(main)
