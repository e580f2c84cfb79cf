"""One SGLang engine of a run, on the GPUs in sight: `python -m megatron_efr.cluster.serve CONFIG
--host A --port P`.

Runs until it is told to end (SIGTERM, SIGINT), or the server failed once more than it may be
started again; nothing of the server is left afterwards.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

import torch

from megatron_efr.addresses import KEY, private_address
from megatron_efr.arguments import PORTS, run, within
from megatron_efr.config import TrainConfig
from megatron_efr.config.file import load
from megatron_efr.errors import UserError
from megatron_efr.rollout.servers.launcher import Launcher
from megatron_efr.weights.architecture import Architecture


def serve(config: TrainConfig, host: str, port: int, index: int) -> int:
    """Start the server, say when it is ready, and keep it running; the exit code, once it stays
    down.
    """
    if not (key := os.environ.get(KEY)):
        raise UserError(
            f"{KEY}: not set; the update endpoints unpickle what they receive: no engine without "
            "a key"
        )
    address = private_address(host)
    rollout = config.rollout
    on_gpu = torch.cuda.is_available()
    # SLURM sends it to all, and the iteration at hand needs the engine
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    architecture = Architecture.from_folder(config.model.path)
    with Launcher(config.folder / "engines", rollout.timeouts.stop_s, key) as launcher:
        launcher.start_engine(
            config.model, architecture, rollout, index, seed=config.seed, on_gpu=on_gpu,
            host=address,
            port=port,
        )  # fmt: skip
        [url] = launcher.wait(rollout.timeouts.start_s)
        print(f"engine {index} is ready at {url}", flush=True)
        launcher.watch(rollout.timeouts, rollout.restarts).join()
        return 1


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of one engine."""
    parser = argparse.ArgumentParser(description="One SGLang engine of a run.")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--host", required=True, help="this machine's name or address on the private network"
    )
    parser.add_argument("--port", type=within(int, *PORTS), required=True)
    parser.add_argument("--index", type=int, default=0, help="which of the run's engines this is")
    given = parser.parse_intermixed_args(argv)
    sys.exit(
        serve(load(TrainConfig, given.config, given.overrides), given.host, given.port, given.index)
    )


if __name__ == "__main__":
    run(main)
