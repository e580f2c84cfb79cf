"""Memory of the log-prob head beside its inputs on a CPU, measured in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_efr.algorithms import Objective
from megatron_efr.kernels import PolicyRows, default_chunk, fused_policy_loss, linear_logprob
from megatron_efr.observe.peak_memory import GIB, Peaks

pytestmark = pytest.mark.alike

T, V, H = 2048, 24_000, 16  # a chunk is all of T, since V is small
ROOT = Path(__file__).parents[3]


def extra(dtype: torch.dtype) -> dict[str, float]:
    """Of each way through the head, its peak of resident memory over one chunk's fp32 logits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, H, generator=generator).to(dtype).requires_grad_()
    w = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(V, (T,), generator=generator)
    columns = [torch.randn(T, generator=generator) for _ in range(3)]
    rows, objective, main_grad = PolicyRows(*columns), Objective(bonus=0.1), torch.zeros(V, H)
    chunk, peaks, found = 4 * default_chunk(V, 1, w.device) * V, Peaks(), {}

    def fused(n: int) -> None:
        fused_policy_loss(
            x[:n], w, targets[:n], rows[slice(n)], objective, factor=1.0, main_grad=main_grad
        )

    def forward(n: int) -> None:
        with torch.no_grad():
            linear_logprob(x[:n], w, targets[:n], entropy=True)

    def backward(n: int) -> None:
        logprobs, entropies = linear_logprob(x[:n], w, targets[:n], entropy=True)
        assert entropies is not None
        torch.autograd.grad((logprobs + entropies).sum(), [x, w])

    for way in (fused, forward, backward):
        way(8)  # what libraries set up once is not the head's
        before = (
            int(re.findall(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024
        )
        peaks.enter(way.__name__)
        way(T)
        peaks.leave()
        found[way.__name__] = (peaks.take()[f"{way.__name__}_memory_gib"] * GIB - before) / chunk
    return found


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="the kernel tells no peak of resident memory",
)
def test_little_more_than_one_chunks_logits() -> None:
    each = "{d: t.extra(getattr(torch, d)) for d in ('float32', 'bfloat16')}"
    code = (
        f"import json, torch, tests.unit.kernels.test_head_memory as t; print(json.dumps({each}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for dtype, ways in found.items():
        assert 0.9 <= min(ways.values()) <= max(ways.values()) <= 1.3, (dtype, ways)


@pytest.mark.parametrize(
    ("rows", "ranks", "device", "tokens"),
    [
        (151_936, 1, "cpu", 441),
        (300, 1, "cpu", 2048),
        (75_968, 2, "cpu", 883),
        (151_936, 1, "cuda", 2048),
    ],
)
def test_a_cpus_chunk_is_bounded_in_bytes(rows: int, ranks: int, device: str, tokens: int) -> None:
    assert default_chunk(rows, ranks, torch.device(device)) == tokens
