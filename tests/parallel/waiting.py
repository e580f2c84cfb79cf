"""One of two ranks (started by launch.py): each gets its own sequences; rank 1 says what it waits
for in vain.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch

from megatron_efr.config import ParallelConfig
from megatron_efr.errors import UserError
from megatron_efr.policy import join_ranks
from megatron_efr.policy.packing import UpdateShares, samples
from megatron_efr.policy.scatter import flatten, scatter_samples
from megatron_efr.types import Credited, Group, Prompt, Response, VersionSpan
from tests.groups import credited

LIMIT_S = 3.0
PLANS = [  # two updates over two replicas; the first's last micro-batch is padding alone
    UpdateShares([[[7, 2], [0]], [[1, 9], []]], {}),
    UpdateShares([[[3]], [[11, 4]]], {}),
]


def groups() -> list[Credited]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(3):
        responses = tuple(
            Response(
                tokens=tuple(rng.integers(0, 99, n).tolist()),
                logprobs=rng.normal(size=n).astype(np.float32),
                finish="stop",
                versions=(VersionSpan(4, 0, 1), VersionSpan(5, 1, n)),
                routed_experts=rng.integers(0, 200, (3 + n - 1, 2, 2)).astype(np.uint8),
            )
            for n in rng.integers(2, 9, 4).tolist()
        )
        made.append(
            credited(Group(Prompt(f"p{i}", (1, 2, 3), "", ""), responses, i), rng.normal(size=4))
        )
    return made


def main(out: str) -> None:
    with join_ranks(ParallelConfig(wait_limit_s=LIMIT_S), seed=0) as ranks:
        mine = ranks.on_main(groups) or []
        own = scatter_samples(samples(mine), PLANS, ranks)
        torch.save(
            (len(mine), list(own), flatten(list(own.values()))), Path(out) / f"{ranks.rank}.pt"
        )
        figures = {"both": float(ranks.rank), f"only {ranks.rank}": 5.0}
        torch.save(
            (ranks.total(2**40 + ranks.rank), ranks.largest(figures)),
            Path(out) / f"figures{ranks.rank}.pt",
        )
        try:
            ranks.on_main(lambda: time.sleep(3 * LIMIT_S), "rollouts")
        except UserError as error:
            (Path(out) / f"{ranks.rank}.txt").write_text(str(error))
        except RuntimeError:  # rank 0, whose peer has gone
            pass


if __name__ == "__main__":
    main(sys.argv[1])
