"""One rank of preference runs (started by launch.py): `efr dpo` itself, one layout after the other.

python -m torch.distributed.run --nproc-per-node=2 -m tests.parallel.preference RUNS "dpo.yaml tensor=2" ...
"""

from __future__ import annotations

import sys

import torch.distributed as dist

from megatron_efr.config import DpoConfig
from megatron_efr.config.file import load
from megatron_efr.dpo import dpo
from tests.parallel.layout import folder


def main(runs: str, *asked: str) -> None:
    dist.init_process_group("gloo")
    for one in asked:
        config, _, layout = one.partition(" ")
        split = [f"parallel.{item}" for item in layout.split(",") if item]
        dpo(load(DpoConfig, config, [f"runs={runs}", f"name={folder(layout)}", *split]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
