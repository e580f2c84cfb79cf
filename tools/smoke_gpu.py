"""Measures what one card says of training and of publication beside it: a policy step, and buckets
by CUDA handle.

    python tools/smoke_gpu.py
        # smoke_gpu.sh runs this, the tests and the kernels as well
    python tools/smoke_gpu.py --cpu
        # a tiny step on the CPU: proves that it starts, its figures mean nothing

The step is `Policy`'s own, of a 1.5B shape with random weights in bf16 (tiny and fp32 on a CPU):
log-probs of a batch of random sequences, and one update on it. MFU counts the FLOPs that the model
needs (three forward passes of a step, causal attention by half) over the card's dense bf16 peak as
its maker states it.

Buckets go as in a colocated publication: `transports.encode` in this process; another rebuilds the
tensors from the handle, the GPU found by its UUID, and copies them into parameters of its own.
Every bucket is a fresh allocation.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from bench.publish import SHAPES
from torch.multiprocessing import reductions

from megatron_efr.algorithms import Objective
from megatron_efr.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_efr.policy import Policy, join_ranks, policy_loss
from megatron_efr.policy.packing import sequence_flops
from megatron_efr.publication.bucket_plan import BUCKET_BYTES
from megatron_efr.publication.reshard import Parcel
from megatron_efr.publication.transports import encode
from megatron_efr.samples import Sample
from megatron_efr.types import IntArray

# dense bf16 FLOP/s, the makers' data sheets
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
TURNS = 5
Row = tuple[str, str]


# -- a policy step
# --------------------------------------------------------------------------------------------------


def sequences(count: int, longest: int, vocab: int) -> list[Sample]:
    """Random tokens of lengths from a quarter of the longest up, the first eighth of each a
    prompt.
    """
    rng = np.random.default_rng(0)
    made = []
    for length in rng.integers(longest // 4, longest + 1, count).tolist():
        prompt = length // 8
        logprobs = -rng.random(length - prompt)
        columns = {"advantage": np.full(length - prompt, rng.normal()), "engine_logprob": logprobs}
        made.append(Sample(rng.integers(0, vocab, length), prompt, columns))
    return made


def step_rows(*, on_gpu: bool) -> Iterator[Row]:
    """The time of a step, and its share of the card's peak if that is known."""
    shape, count, longest, budget = ("1.5B", 24, 4096, 8192) if on_gpu else ("tiny", 4, 64, 128)
    with tempfile.TemporaryDirectory() as folder, join_ranks(ParallelConfig(), seed=0) as ranks:
        # a model of published shape with random weights: time does not depend on their values
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
        model = ModelConfig(path=folder, init="random", dtype="bfloat16" if on_gpu else "float32")
        policy = Policy(
            model, ParallelConfig(), OptimizerConfig(lr=1e-6), ranks, updates=1000, seed=0
        )
        drawn = sequences(count, longest, policy.architecture.vocab)
        batches = policy.pack_update(drawn, list(range(count)), budget, "sequence")
        # operations of one forward pass; an update is three of them
        loss, flops = (
            policy_loss(Objective()),
            sum(map(sequence_flops(policy.architecture), map(len, tokens(drawn)))),
        )
        work = {"log-probs": (policy.score, 1), "update": (lambda b: policy.update(b, loss), 3)}
        yield (
            "policy",
            (
                f"{shape} shape, {model.dtype}, {sum(map(len, tokens(drawn)))} tokens in "
                f"{len(batches)} batches"
            ),
        )
        # medians, the first call apart
        for name, (action, passes) in work.items():
            action(batches)  # compiles and allocates
            seconds = statistics.median(
                timed(lambda action=action: action(batches)) for _ in range(TURNS)
            )
            yield (
                name,
                f"{seconds:.3f} s, {passes * flops / seconds / 1e12:.3g} "
                f"TFLOP/s{share(passes * flops / seconds)}",
            )
        if on_gpu:
            yield "peak memory of a step", f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"


def tokens(drawn: list[Sample]) -> list[IntArray]:
    return [sequence.tokens for sequence in drawn]


def share(rate: float) -> str:
    """Of the card's peak."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    peak = next((peak for card, peak in PEAKS.items() if card in name), None)
    return (
        f" (no peak is known of {name})"
        if peak is None
        else f", {rate / peak:.1%} of {peak / 1e12:.0f} (MFU)"
    )


def timed(action: Any) -> float:
    synchronize()
    began = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# -- buckets by handle
# -------------------------------------------------------------------------------------------------


def handle_rows() -> Iterator[Row]:
    """Seconds of a bucket from one process to another, and its bytes over that of the copy
    alone.
    """
    shape = (BUCKET_BYTES // 2 // 16 // 4096, 4096)
    # a second process that opens handles
    opener = subprocess.Popen(
        [sys.executable, __file__, "--open"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert opener.stdin is not None
    assert opener.stdout is not None
    turns = []
    # hand over buckets of known content; the first turn warms up
    for turn in range(TURNS + 1):
        flat = torch.full(
            (16 * shape[0] * shape[1],), float(turn), dtype=torch.bfloat16, device="cuda"
        )
        pairs = [(f"layer{i}", part.view(shape)) for i, part in enumerate(flat.chunk(16))]
        # the fill must be over before the clock starts
        synchronize()
        began = time.perf_counter()
        payload, _ = encode(Parcel(pairs, flat.view(torch.uint8)))
        encoded = time.perf_counter() - began
        print(payload, file=opener.stdin, flush=True)
        answer = json.loads(opener.stdout.readline())
        turns.append((encoded, answer["open"], answer["copy"], time.perf_counter() - began))
        # the sum shows that the other process read these very bytes
        if answer["sum"] != 16.0 * turn * shape[0] * shape[1]:
            raise SystemExit(f"a bucket of {turn}s came out otherwise: its sum is {answer['sum']}")
    # the rows
    opener.stdin.close()
    opener.wait()
    encoding, opening, copying, whole = (
        statistics.median(column) for column in zip(*turns[1:], strict=True)
    )
    yield (
        "bucket by handle",
        f"{BUCKET_BYTES / 2**20:.0f} MiB: {whole * 1e3:.1f} ms there and answered",
    )
    yield (
        "of which",
        (
            f"encoded {encoding * 1e3:.1f}, opened {opening * 1e3:.1f}, "
            f"copied {copying * 1e3:.1f} ms"
        ),
    )
    yield "copy rate", f"{BUCKET_BYTES / copying / 1e9:.0f} GB/s (read here, written there)"
    yield "the first bucket", f"opened in {turns[0][1] * 1e3:.1f} ms"


class Opener(pickle.Unpickler):
    """Rebuilds tensors on the GPU that has the handle's UUID, as SGLang's unpickler does."""

    def find_class(self, module: str, name: str, /) -> Any:
        return by_uuid if name == "rebuild_cuda_tensor" else super().find_class(module, name)


def by_uuid(*given: Any) -> torch.Tensor:
    """torch's `rebuild_cuda_tensor`, with a UUID if it takes the device's number."""
    uuids = [
        str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())
    ]
    return cast(Any, reductions.rebuild_cuda_tensor)(*given[:6], uuids.index(given[6]), *given[7:])


def serve_opened() -> None:
    """The other process: opens each bucket and copies it into parameters of its own, as an engine
    does.
    """
    own: dict[str, torch.Tensor] = {}
    for line in sys.stdin:
        began = time.perf_counter()
        found = Opener(io.BytesIO(base64.b64decode(line))).load()
        synchronize()
        opened = time.perf_counter()
        for part in found["metadata"]:
            if part.name not in own:
                own[part.name] = torch.empty(part.shape, dtype=part.dtype, device="cuda")
            sent = found["flattened_tensor"][part.start_idx : part.end_idx]
            own[part.name].copy_(sent.view(part.dtype).reshape(part.shape))
        synchronize()
        done = time.perf_counter()
        found = sent = None  # lets go of the handle
        total = sum(float(tensor.double().sum()) for tensor in own.values())
        print(json.dumps({"open": opened - began, "copy": done - opened, "sum": total}), flush=True)


# -- all of it
# --------------------------------------------------------------------------------------------------


def machine() -> Iterator[Row]:
    card = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"none: {platform.processor() or 'a CPU'}"
    )
    yield "card", card
    yield (
        "torch",
        (
            f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, Python "
            f"{platform.python_version()}"
        ),
    )
    yield "date", date.today().isoformat()


def rows(*, on_gpu: bool) -> Iterator[Row]:
    yield from machine()
    yield from step_rows(on_gpu=on_gpu)
    if on_gpu:
        torch.cuda.empty_cache()
        yield from handle_rows()
    else:
        yield "bucket by handle", "not measured: CUDA handles need a CUDA device"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="tiny, where there is no card")
    parser.add_argument("--open", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.open:
        return serve_opened()
    if not given.cpu and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --cpu shows that the program starts")
    lines = [f"| {name} | {said} |" for name, said in rows(on_gpu=not given.cpu)]
    print("\n".join(["| what | measured |", "|---|---|", *lines]))
    return None


if __name__ == "__main__":
    main()
