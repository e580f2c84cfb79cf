"""Two ranks that hand their buckets to a server each, of which one is killed when it has two of
them.

torchrun --nproc-per-node=2 -m tests.engine.handed FOLDER URL,URL PIDS: rank 0 prints how many
buckets there are, and how many each rank has made payloads of.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import torch.distributed as dist

from megatron_efr.policy import join_ranks
from megatron_efr.publication import transports
from megatron_efr.publication.reshard import Parcel
from megatron_efr.publication.sglang_layout import EngineLayout
from megatron_efr.publication.transports import Handles, Prepared
from megatron_efr.rollout.sglang.engine import SGLangEngine
from megatron_efr.weights.architecture import Architecture
from tests.engine.conftest import SLOTS
from tests.engine.faults import LIMITS
from tests.engine.published import make_policy, make_publisher
from tests.parallel.layout import split


class Killing(Handles):
    """Kills processes before the third bucket is delivered."""

    delivered = 0
    victims: tuple[int, ...] = ()

    def deliver(self, prepared: Prepared) -> None:
        self.delivered += 1
        if self.delivered == 3:
            for victim in self.victims:
                os.kill(victim, signal.SIGKILL)
        super().deliver(prepared)


def main(folder: str, urls: str, victims: str) -> None:
    made: list[Parcel] = []
    encode = transports.encode
    transports.encode = lambda parcel: made.append(parcel) or encode(parcel)
    architecture = Architecture.from_folder(folder)
    with join_ranks(split(""), seed=0) as ranks:
        key = os.environ["SGLANG_API_KEY"]
        engine = (
            SGLangEngine(urls.split(","), architecture, SLOTS, LIMITS, key=key)
            if ranks.is_main
            else None
        )
        transport = Killing(engine, ranks.cpu_world)
        transport.victims = tuple(map(int, victims.split(",")))
        policy = make_policy(folder, "", ranks)
        make_publisher(transport, engine, EngineLayout(architecture, 1), ranks).publish(policy, 1)
        counts: list[Any] = [None] * 2
        dist.all_gather_object(counts, len(made), group=ranks.cpu_world)
        if engine is not None:
            buckets = sum(1 for _ in policy.parcels(flat=True, everywhere=False))
            print(json.dumps({"buckets": buckets, "made": counts, "version": engine.version}))
            engine.close()
        else:
            list(policy.parcels(flat=True, everywhere=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
