"""One rank of whole runs (started by launch.py): `efr train` or `efr dpo` itself, one layout after
the other.

python -m torch.distributed.run --nproc-per-node=2 -m tests.parallel.programs train RUNS "dense.yaml
tensor=2" ...
"""

from __future__ import annotations

import sys

import torch.distributed as dist

from megatron_efr.config import DpoConfig, TrainConfig
from megatron_efr.config.file import load
from megatron_efr.dpo import dpo
from megatron_efr.train import train
from tests.parallel.layout import folder


def main(program: str, runs: str, *asked: str) -> None:
    dist.init_process_group("gloo")
    for one in asked:
        config, _, layout = one.partition(" ")
        split = [f"parallel.{item}" for item in layout.split(",") if item]
        values = [f"runs={runs}", f"name={folder(layout)}", *split]
        if program == "train":
            train(load(TrainConfig, config, values))
        else:
            dpo(load(DpoConfig, config, values))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
