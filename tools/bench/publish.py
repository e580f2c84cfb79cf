"""Times a publication of weights beside the bare collectives that its plan needs, and holds a model
of time to both.

    python tools/bench/publish.py
        # 0.5B and 1.5B shapes in bf16, TP2 x PP1 and TP1 x PP2, on a CPU
    python tools/bench/publish.py --quick      # a smoke run on a tiny shape: the times mean nothing

One process per trainer rank, and one that stands for an engine: it takes part in every broadcast
and throws the bytes away. A publication gathers whole tensors on rank 0 bucket by bucket and
broadcasts each bucket. The bare run sends the same bytes from rank to rank, one message each, and
the same broadcasts, from buffers that are there already, and maps and copies nothing. Both are
measured in turns in one run; a figure is the median over turns, a ratio the median of the turns'
own ratios. "In processor time" is the same ratio of the seconds that all ranks spent on processors:
what else runs on the machine changes it little.

The model of time (`megatron_efr.publication.timing`) takes bandwidths that are measured in each
turn, on one of the plan's buckets. With stated bandwidths it says what a GPU machine would take.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from megatron_efr.publication.bucket_plan import BUCKET_BYTES, Bucket, BucketPlan, Held
from megatron_efr.publication.reshard import Reshard
from megatron_efr.publication.timing import Bandwidths, seconds
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.mapping import WeightMapping

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
_QWEN2 = {
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "num_key_value_heads": 2,
    "num_attention_heads": 12,
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _QWEN2 | {"hidden_size": 384, "num_hidden_layers": 8, "intermediate_size": 1536,
        "vocab_size": 8003,
                      "tie_word_embeddings": True},
    "0.5B": _QWEN2 | {"hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864,
        "vocab_size": 151936,
                      "tie_word_embeddings": True, "num_attention_heads": 14},
    "1.5B": _QWEN2 | {"hidden_size": 1536, "num_hidden_layers": 28, "intermediate_size": 8960,
        "vocab_size": 151936,
                      "tie_word_embeddings": True},
    "7B": _QWEN2 | {"hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944,
        "vocab_size": 152064,
                    "num_attention_heads": 28, "num_key_value_heads": 4},
    "32B": _QWEN2 | {"hidden_size": 5120, "num_hidden_layers": 64, "intermediate_size": 27648,
        "vocab_size": 152064,
                     "num_attention_heads": 40, "num_key_value_heads": 8},
}  # fmt: skip


@dataclass(frozen=True)
class Statement:
    """A prediction, by the model of time, for a machine that is not here: its bandwidths are
    inputs.
    """

    name: str
    shape: str
    tensor: int
    pipeline: int
    rates: Bandwidths
    everywhere: bool
    goal_s: float


# bytes a second: of one GPU's links, of one 400 Gb/s card, copied in place
_NVLINK, _NETWORK, _HBM = 200e9, 40e9, 1e12
_ANSWER = 0.010  # seconds of one HTTP call
STATEMENTS = [
    Statement(
        "7B on 8 H100, colocated, TP2",
        "7B",
        2,
        1,
        Bandwidths(_NVLINK, _HBM, _HBM, _ANSWER),
        True,
        1.0,
    ),
    Statement(
        "32B on 4 nodes, colocated, TP8 x PP4",
        "32B",
        8,
        4,
        Bandwidths(_NETWORK, _HBM, _HBM, _ANSWER),
        True,
        3.0,
    ),
    Statement(
        "32B on 4 nodes, 2 of engines, TP8",
        "32B",
        8,
        1,
        Bandwidths(_NVLINK, _HBM, _NETWORK, _ANSWER),
        False,
        3.0,
    ),
]


def held(mapping: WeightMapping, tensor: int, pipeline: int) -> dict[int, Held]:
    """The bytes that every rank of a split holds in bf16: equal runs of layers, embedding first,
    head last.
    """
    layers = mapping.architecture.layers
    found: dict[int, Held] = {}
    for stage in range(pipeline):
        shards = {}
        for name in mapping.parameters():
            parts = name.split(".")
            if parts[1] == "layers":
                owner = int(parts[2]) * pipeline // layers
            else:
                owner = 0 if parts[0] == "embedding" else pipeline - 1
            if owner == stage:
                shape = list(mapping.shape(name))
                if mapping.is_sharded(name):
                    shape[1 if mapping.split(name) == "row" else 0] //= tensor
                shards[name] = (tuple(shape), torch.bfloat16)
        found |= {stage * tensor + rank: Held(rank, shards) for rank in range(tensor)}
    return found


def plan_of(
    shape: str, tensor: int, pipeline: int, limit: int
) -> tuple[BucketPlan, WeightMapping, dict[int, Held]]:
    mapping = WeightMapping(Architecture.from_config(SHAPES[shape]), tensor)
    split = held(mapping, tensor, pipeline)
    return BucketPlan.derive(split, mapping, limit), mapping, split


# -- one rank
# --------------------------------------------------------------------------------------------------


class Rank:
    """One process: a trainer rank, or the engine, which comes last."""

    def __init__(self, shape: str, tensor: int, pipeline: int, limit: int) -> None:
        self.rank, world = dist.get_rank(), dist.get_world_size()
        self.engine = world - 1
        self.plan, mapping, split = plan_of(shape, tensor, pipeline, limit)
        self.group = cast(dist.ProcessGroup, dist.new_group(list(range(self.engine))))
        self.link = cast(dist.ProcessGroup, dist.new_group([0, self.engine]))
        self.local = {}
        if self.rank < self.engine:
            for name, (size, dtype) in split[self.rank].shards.items():
                self.local[name] = torch.randint(-9, 9, size, dtype=torch.int16).view(dtype)
            self.reshard = Reshard(self.plan, mapping, self.group)
        shapes = mapping.shapes()
        self.sizes = [
            [
                torch.Size(shapes[hf]).numel() * 2
                for entry in bucket.entries
                for hf in mapping.sources(entry.name)
            ]
            for bucket in self.plan.buckets
        ]

    def broadcasts(self, number: int) -> list[int]:
        """Bytes of each broadcast of a bucket: one, unless it is one parameter that is sent as it
        lies.
        """
        return (
            self.sizes[number] if self.plan.buckets[number].is_at(0) else [sum(self.sizes[number])]
        )

    def publication(self) -> None:
        """Ours."""
        if self.rank == self.engine:
            return self.take_broadcasts()
        for parcel in self.reshard.parcels(self.local, flat=True):
            if self.rank == 0:
                for sent in (
                    [parcel.flat] if parcel.flat is not None else [t for _, t in parcel.tensors]
                ):
                    dist.broadcast(sent.contiguous(), 0, group=self.link)
            del parcel
        return None

    def bare(self) -> None:
        """The same messages and broadcasts, in the same order, from buffers that are there."""
        if self.rank == self.engine:
            return self.take_broadcasts()
        buckets = self.plan.buckets
        works = self.messages(buckets[0])
        for number, bucket in enumerate(buckets):
            for work in works:
                work.wait()
            works = []
            overlaps = number + 1 < len(buckets) and self.plan.overlaps(
                bucket, buckets[number + 1], 0
            )
            if overlaps:
                works = self.messages(buckets[number + 1])
            if self.rank == 0:
                for size in self.broadcasts(number):
                    dist.broadcast(self.buffer("out", size), 0, group=self.link)
            if number + 1 < len(buckets) and not overlaps:
                works = self.messages(buckets[number + 1])
        return None

    def messages(self, bucket: Bucket) -> list[Any]:
        sizes = {
            r: sum(e.shard_bytes for e in entries) for r, entries in bucket.messages(0).items()
        }
        works = []
        for rank, size in sizes.items():
            if self.rank == 0:
                works.append(dist.irecv(self.buffer(f"in{rank}", size), rank, group=self.group))
            elif self.rank == rank:
                works.append(dist.isend(self.buffer("mine", size), 0, group=self.group))
        return works

    def take_broadcasts(self) -> None:
        for number in range(len(self.plan.buckets)):
            for size in self.broadcasts(number):
                dist.broadcast(self.buffer("out", size), 0, group=self.link)

    def buffer(self, name: str, size: int) -> torch.Tensor:
        """The first `size` bytes of a buffer that is kept."""
        kept = self.__dict__.setdefault("_buffers", {})
        if name not in kept or kept[name].numel() < size:
            kept[name] = torch.ones(size, dtype=torch.uint8)
        return kept[name][:size]

    def rates(self) -> Bandwidths:
        """Measured on the bucket of which most arrives, each alone, and arriving and sending at
        once.
        """
        bucket = max(self.plan.buckets, key=self.arriving)
        moved, whole = self.arriving(bucket), min(bucket.nbytes, self.plan.limit)

        # each action alone
        def arrive() -> None:
            for work in self.messages(bucket) if self.rank != self.engine else []:
                work.wait()

        def send() -> None:
            if self.rank in (0, self.engine):
                dist.broadcast(self.buffer("out", whole), 0, group=self.link)

        def both() -> None:
            works = self.messages(bucket) if self.rank != self.engine else []
            send()
            for work in works:
                work.wait()

        def copy() -> None:
            if self.rank == 0:
                self.buffer("copy", whole).copy_(self.buffer("out", whole))

        # times, and how much of arriving hides behind sending
        arriving, sending, together = timed(arrive), timed(send), timed(both)
        hidden = (arriving + sending - together) / min(arriving, sending)
        return Bandwidths(
            moved / arriving,
            whole / timed(copy),
            whole / sending,
            overlap=min(max(hidden, 0.0), 1.0),
        )

    @staticmethod
    def arriving(bucket: Bucket) -> int:
        return sum(
            entry.shard_bytes for entries in bucket.messages(0).values() for entry in entries
        )


def timed(action: Callable[[], None], times: int = 3) -> float:
    """Median seconds, from a start that all ranks share to the end of the slowest."""
    found = []
    for _ in range(times):
        dist.barrier()
        began = time.perf_counter()
        action()
        dist.barrier()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def peak_extra(action: Callable[[], None]) -> int:
    """Bytes by which this process's resident memory rose over what it was, at its highest
    (Linux).
    """
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    before = _resident("VmRSS")
    action()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    line = next(
        x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)
    )
    return int(line.split()[1]) * 1024


def work(shape: str, tensor: int, pipeline: int, limit: int, turns: int, out: Path) -> None:
    """One rank's part; rank 0 writes the row."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    # warm up, then memory beyond parameters at the first and a later publication
    rank = Rank(shape, tensor, pipeline, limit)
    rank.bare()
    extra, again = peak_extra(rank.publication), peak_extra(rank.publication)
    # turns: bandwidths, the bare transfers, the whole publication
    ours, bare, rates, processor = [], [], [], []
    for _ in range(turns):
        rates.append(rank.rates())
        spent = [time.process_time()]
        for action, found in ((rank.bare, bare), (rank.publication, ours)):
            found.append(timed(action, 1))
            spent.append(time.process_time())
        processor.append([b - a for a, b in pairwise(spent)])
    # processor time of all ranks; rank 0 writes the row
    everyone = torch.tensor(processor)
    dist.all_reduce(everyone)
    if rank.rank == 0:
        # the model of publish time is held against the bandwidths measured here
        median = Bandwidths(
            *(statistics.median(values) for values in zip(*(r.values for r in rates), strict=True))
        )
        sent = sum(sum(sizes) for sizes in rank.sizes)
        row = {
            "shape": shape, "tensor": tensor, "pipeline": pipeline, "gb": sent / 1e9,
            "seconds": statistics.median(ours),
            "bare_seconds": statistics.median(bare),
            "gb_per_s": sent / 1e9 / statistics.median(ours),
            "of_bare": statistics.median(b / o for o, b in zip(ours, bare, strict=True)),
            "processor_of_bare": float((everyone[:, 0] / everyone[:, 1]).median()),
            "of_model": statistics.median(o / seconds(rank.plan, r) for o,
                r in zip(ours, rates, strict=True)),
            "model_seconds": seconds(rank.plan, median), "rates": asdict(median),
            "peak_extra_mib": extra / MIB, "again_extra_mib": again / MIB,
            "limit_mib": (2 * limit + rank.plan.largest) / MIB,
        }  # fmt: skip
        out.write_text(json.dumps(row))
    dist.barrier()
    dist.destroy_process_group()


# -- all of it
# --------------------------------------------------------------------------------------------------


def measure(shape: str, tensor: int, pipeline: int, limit: int, turns: int) -> dict[str, Any]:
    """Start the ranks of one row."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        own = [
            __file__,
            "--rank",
            shape,
            str(tensor),
            str(pipeline),
            str(limit),
            str(turns),
            str(out),
        ]
        done = subprocess.run(
            [*command, f"--nproc-per-node={tensor * pipeline + 1}", *own],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(
                f"{shape} TP{tensor} x PP{pipeline}: a rank failed:\n{done.stderr[-3000:]}"
            )
        return json.loads(out.read_text())


def statements() -> Iterator[dict[str, Any]]:
    """The model of time on machines that are not here."""
    for statement in STATEMENTS:
        plan, _, _ = plan_of(statement.shape, statement.tensor, statement.pipeline, BUCKET_BYTES)
        whole = seconds(plan, statement.rates, None if statement.everywhere else 0)
        bare = seconds(plan, statement.rates.bare(), None if statement.everywhere else 0)
        yield {
            "name": statement.name, "seconds": whole, "goal_s": statement.goal_s,
            "of_bare": bare / whole,
            "gb": plan.nbytes / 1e9, "rates": asdict(statement.rates),
        }  # fmt: skip


def table(rows: list[dict[str, Any]], said: list[dict[str, Any]]) -> str:
    """Both as Markdown."""
    lines = [
        "| shape | split | GB | publication | bare collectives | of bare | in processor time | "
        "GB/s | model of time | memory (limit) |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        lines.append(
            f"| {r['shape']} | TP{r['tensor']} x PP{r['pipeline']} | {r['gb']:.2f} | "
            f"{r['seconds']:.2f} s | {r['bare_seconds']:.2f} s | {r['of_bare']:.0%} | "
            f"{r['processor_of_bare']:.0%} | {r['gb_per_s']:.2f} | {r['model_seconds']:.2f} s "
            f"({1 / r['of_model'] - 1:+.0%}) | {r['peak_extra_mib']:.0f} ({r['limit_mib']:.0f}) "
            "MiB |"
        )
    lines += [
        "",
        "| by the model, not measured | GB | seconds | goal | of bare |",
        "|---|---:|---:|---:|---:|",
    ]
    for s in said:
        lines.append(
            f"| {s['name']} | {s['gb']:.1f} | {s['seconds']:.2f} | {s['goal_s']:.0f} | "
            f"{s['of_bare']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--shapes", default="0.5B,1.5B", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--bucket-mib", type=int, default=128)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--rank", nargs=6, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        shape, tensor, pipeline, limit, turns, out = given.rank
        return work(shape, int(tensor), int(pipeline), int(limit), int(turns), Path(out))
    shapes = ["tiny"] if given.quick else given.shapes.split(",")
    limit = (4 if given.quick else given.bucket_mib) * MIB
    turns = 1 if given.quick else given.turns
    rows = [measure(shape, *split, limit, turns) for shape in shapes for split in ((2, 1), (1, 2))]
    said = list(statements())
    print(table(rows, said))
    if given.json:
        given.json.write_text(json.dumps({"measured": rows, "model": said}, indent=1))
    return None


if __name__ == "__main__":
    main()
