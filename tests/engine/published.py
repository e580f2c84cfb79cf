"""A trainer that publishes (one rank of it): policies under one layout after the other, to a server
that runs.

python -m torch.distributed.run --nproc-per-node=2 -m tests.engine.published URL RANKS FOLDERS
"tensor=2:tensor" ...

Case n publishes FOLDERS[n % 2]; rank 0 then compares what the server says with transformers.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from megatron_efr.config import ModelConfig, OptimizerConfig, TimeoutsConfig
from megatron_efr.policy import Policy, join_ranks
from megatron_efr.policy.ranks import Ranks
from megatron_efr.publication.checksums import ChecksumCheck, Hashing
from megatron_efr.publication.publisher import Publisher, Transport
from megatron_efr.publication.sglang_layout import EngineLayout
from megatron_efr.publication.transports import Broadcast, Disk, InBand, Sliced
from megatron_efr.rollout.sglang.engine import SGLangEngine
from megatron_efr.scripts import plain
from megatron_efr.types import Prompt, Sampling
from megatron_efr.weights.architecture import Architecture
from tests.parallel.layout import split

BUCKET = 60_000  # bytes: several buckets, and an embedding of its own


def distance(engine: SGLangEngine, folder: str | Path) -> float:
    """Largest difference between the server's greedy log-probs and transformers' with `folder`'s
    weights; infinite if a token is not transformers' choice.
    """
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = [tuple(3 + (5 * i + 7 * j) % 50 for j in range(3 + 4 * i)) for i in range(6)]
    requests = [
        plain(Prompt(f"p{i}", tokens, "", ""), 1, seed=i) for i, tokens in enumerate(prompts)
    ]
    worst = 0.0
    for group in engine.generate(requests, Sampling(0.0, 1.0, 12, ())):
        prompt, response = group.prompt.tokens, group.responses[0]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response.tokens]])).logits[
                0, len(prompt) - 1 : -1
            ]
        logprobs = torch.log_softmax(logits, -1)
        if logprobs.argmax(-1).tolist() != list(response.tokens):
            return float("inf")
        said = logprobs[torch.arange(len(response.tokens)), torch.tensor(response.tokens)]
        worst = max(worst, float((said - torch.tensor(response.logprobs)).abs().max()))
    return worst


def connect(url: str, engine_ranks: int, folder: str | Path) -> SGLangEngine:
    architecture = Architecture.from_folder(folder)
    key = os.environ["SGLANG_API_KEY"]
    return SGLangEngine(
        [url], architecture, 8, TimeoutsConfig(), key=key, engine_ranks=engine_ranks
    )


def make_transport(
    kind: str, engine: SGLangEngine | None, layout: EngineLayout, folder: str | Path
) -> Transport:
    if kind == "distributed":
        return Broadcast(engine, "127.0.0.1", "gloo")
    if kind == "disk":
        return Disk(engine, Path(folder).with_name("published"), Path(folder))
    return InBand(engine) if kind == "tensor" else Sliced(engine, layout)


def make_publisher(
    transport: Transport,
    engine: SGLangEngine | None,
    layout: EngineLayout,
    ranks: Ranks,
    dtype: torch.dtype = torch.float32,
    hashing: Hashing = "sha256",
) -> Publisher:
    """One that checks every publication."""

    def check() -> ChecksumCheck:
        return ChecksumCheck(layout, dtype, hashing)

    return Publisher(transport, engine, ranks.cpu_world, check=check, verify_every=1)


def make_policy(folder: str | Path, layout: str, ranks: Ranks) -> Policy:
    optimizer = OptimizerConfig(lr=1e-3)
    model = ModelConfig(path=str(folder))
    return Policy(model, split(layout), optimizer, ranks, updates=1, seed=0, bucket_bytes=BUCKET)


class Dying(InBand):
    """A trainer that is killed after its second bucket."""

    delivered = 0

    def deliver(self, prepared: Any) -> None:
        super().deliver(prepared)
        self.delivered += 1
        if self.delivered == 2:
            os.kill(os.getpid(), signal.SIGKILL)


class DyingBroadcast(Broadcast):
    """The same, in the middle of a bucket that the server waits for."""

    delivered = 0

    def deliver(self, prepared: Any) -> None:
        self.delivered += 1
        if self.delivered == 2:
            assert self._engines is not None
            assert self._group is not None
            names = [name for name, _ in prepared.tensors]
            shapes = [list(tensor.shape) for _, tensor in prepared.tensors]
            self._engines.update_from_distributed(
                names, ["float32"] * len(names), shapes, self._group.name, None
            )
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        super().deliver(prepared)


def publish(url: str, engine_ranks: int, folders: list[str], number: int, case: str) -> None:
    layout, kind = case.split(":")
    folder, other = folders[number % 2], folders[1 - number % 2]
    with join_ranks(split(layout), seed=0) as ranks:
        engine = connect(url, engine_ranks, folder) if ranks.is_main else None
        engine_layout = EngineLayout(Architecture.from_folder(folder), engine_ranks)
        if kind.startswith("dying"):
            transport = (
                DyingBroadcast(engine, "127.0.0.1", "gloo")
                if "distributed" in kind
                else Dying(engine)
            )
        else:
            transport = make_transport(kind, engine, engine_layout, folder)
        publisher = make_publisher(transport, engine, engine_layout, ranks)
        publisher.publish(make_policy(folder, layout, ranks), version=number + 1)
        if engine is not None:
            apart, before = distance(engine, folder), distance(engine, other)
            print(f"{case}: {apart:.1e} from its weights, {before:.1e} from the other", flush=True)
            assert apart <= 1e-5
            assert before > 1e-2
            engine.close()
        ranks.barrier()


def main(url: str, engine_ranks: str, folders: str, *cases: str) -> None:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    for number, case in enumerate(cases):
        publish(url, int(engine_ranks), folders.split(","), number, case)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
