"""Times publications to a real SGLang server by each transport, beside a bare broadcast of the same
bytes.

    python tools/bench/transports.py
        # a Qwen2 of 0.13 GB in fp32 to a server on this machine's CPU
    python tools/bench/transports.py --hidden 256  # a smaller one

Each transport gets a run of its own (`open_run`), with a server that it starts. A publication is
all of it: pause, flush, buckets, flush, version, go on. The first, whose checksums are compared, is
not counted. The bare broadcast sends the same buckets over gloo to a process that throws them away,
within the same turn.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from publish import ROOT

from megatron_efr.config import TrainConfig
from megatron_efr.config.file import load
from megatron_efr.data.arithmetic import ArithmeticTask, write
from megatron_efr.data.model_folder import ModelSize
from megatron_efr.run.run import open_run

TRANSPORTS = ("tensor", "distributed", "disk")
BUCKET_MIB = 32


def configuration(place: Path, transport: str, python: str, hidden: int) -> TrainConfig:
    """The quickstart's, with a wider model, a server, and buckets of which the model has
    several.
    """
    size = ModelSize(
        hidden=hidden, layers=8, heads=hidden // 64, kv_heads=hidden // 64, intermediate=4 * hidden
    )
    task = place / "task"
    if not task.exists():
        write(task, 0, ArithmeticTask(train_rows=24, test_rows=4, sft_rows=4, model=size))
    tree: dict[str, Any] = yaml.safe_load((ROOT / "examples/quickstart/rl.yaml").read_text())
    tree |= {
        "name": transport,
        "runs": str(place),
        "model": {"path": str(task / "model"), "init": "random"},
    }
    tree["data"]["datasets"][0]["path"] = str(task / "train.jsonl")
    tree.pop("evaluation")
    tree["rollout"] |= {
        "engine": "sglang",
        "python": python,
        "transport": transport,
        "bucket_mib": BUCKET_MIB,
    }
    tree["rollout"] |= {"verify_every": 1000}
    (place / "config.yaml").write_text(yaml.safe_dump(tree))
    return load(TrainConfig, place / "config.yaml", [])


class Peer:
    """Another process in a gloo group with this one, which takes broadcasts and throws them
    away.
    """

    def __init__(self, place: Path) -> None:
        self._link, theirs = multiprocessing.get_context("spawn").Pipe()
        store = str(place / "store")
        self._process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(store, theirs), daemon=True
        )
        self._process.start()
        self._group = pair(store, 0)

    def seconds(self, sizes: list[int]) -> float:
        """Of broadcasts of so many bytes each, from buffers that were touched before."""
        buffers = [torch.ones(size, dtype=torch.uint8) for size in sizes]
        self._link.send(sizes)
        self._link.recv()
        began = time.perf_counter()
        for buffer in buffers:
            self._group.broadcast([buffer], dist.BroadcastOptions()).wait()
        self._link.recv()
        return time.perf_counter() - began

    def close(self) -> None:
        self._link.send(None)
        self._process.join()


def pair(store: str, rank: int) -> Any:
    return dist.ProcessGroupGloo(dist.FileStore(store, 2), rank, 2, timedelta(minutes=5))


def serve(store: str, link: Any) -> None:
    torch.set_num_threads(1)
    group = pair(store, 1)
    while (sizes := link.recv()) is not None:
        buffers = [torch.ones(size, dtype=torch.uint8) for size in sizes]
        link.send("ready")
        for buffer in buffers:
            group.broadcast([buffer], dist.BroadcastOptions()).wait()
        link.send("done")


def measure(config: TrainConfig, peer: Peer, turns: int) -> str:
    """A row of the table."""
    with open_run(config) as run:
        run.publisher.publish(run.policy, 0)
        sizes = [
            sum(t.nbytes for _, t in parcel.tensors) for parcel in run.policy.parcels(flat=True)
        ]
        ours, bare = [], []
        for turn in range(1, turns + 1):
            bare.append(peer.seconds(sizes))
            began = time.perf_counter()
            run.publisher.publish(run.policy, turn)
            ours.append(time.perf_counter() - began)
    seconds, ratio = (
        statistics.median(ours),
        statistics.median(b / o for b, o in zip(bare, ours, strict=True)),
    )
    return (
        f"| {config.rollout.transport} | {sum(sizes) / 1e9:.2f} | {len(sizes)} | {seconds:.2g} s "
        f"| {sum(sizes) / 1e9 / seconds:.2g} | {statistics.median(bare):.2g} s | {ratio:.0%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # a wider model says more of bandwidth, and takes longer
    parser.add_argument(
        "--hidden", type=int, default=512, help="width of the model, a multiple of 64"
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--python",
        default=str(ROOT / ".venv-sglang/bin/python"),
        help="the interpreter with SGLang",
    )
    given = parser.parse_args()
    # one thread each: trainer, server and peer share the cores
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(Path(folder))
        rows = [
            measure(
                configuration(Path(folder), transport, given.python, given.hidden),
                peer,
                given.turns,
            )
            for transport in TRANSPORTS
        ]
        peer.close()
    # a bare broadcast of the same bytes is what a transport is measured by
    print("| transport | GB | buckets | publication | GB/s | broadcast alone | of it |")
    print("\n".join(["|---|---:|---:|---:|---:|---:|---:|", *rows]))


if __name__ == "__main__":
    main()
