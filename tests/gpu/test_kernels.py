"""The kernel suite on a card, with what only a card can show: bf16, races, and more logits than an
int32 counts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_efr.algorithms import Objective
from megatron_efr.kernels.row_kernels import Logits, Softmax, Statistics, merge

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here"
    ),
]

if torch.cuda.is_available():
    from megatron_efr.kernels import (
        PolicyRows,
        fused_policy_loss,
        linear_logprob,
        matmul,
        triton_rows,
    )
    from tests.kernel_suite import *  # noqa: F403  the tests themselves
    from tests.kernel_suite import case, exact, relative

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("vocab", [5000, 8192 + 11])
def test_bf16_at_the_shipped_block(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rows, "BLOCK", 4096)
    x, w = case(300, 256, vocab + 5, torch.bfloat16)
    targets = torch.arange(300, device="cuda") * 16 % vocab
    want, _ = exact(x, w, targets, 1.0, vocab)
    logprob, _ = linear_logprob(x, w, targets, true_vocab=vocab, chunk=128, backend="triton")
    assert (logprob.double() - want).abs().max() <= 1e-4, "fp32 logits of bf16 operands"
    d_hidden, d_weight = torch.autograd.grad(want.sum(), [x, w])
    one = torch.ones(300, device="cuda")
    results = []
    for _ in range(2):
        main_grad = torch.zeros(w.shape, device="cuda")
        out = fused_policy_loss(
            x, w, targets, PolicyRows(logprob.detach(), one, one), Objective(), main_grad=main_grad,
            factor=1.0,
            true_vocab=vocab, chunk=128, backend="triton",
        )  # fmt: skip
        results.append((torch.autograd.grad(out.loss, x)[0], main_grad))
    assert torch.equal(out.logprobs, logprob), "the first update's ratio is exactly 1"
    assert torch.equal(results[0][0], results[1][0]), "bit for bit"
    assert torch.equal(results[0][1], results[1][1]), "bit for bit"
    assert relative(-results[0][0], d_hidden) <= 1e-2
    assert relative(-results[0][1], d_weight) <= 1e-2


def test_fp32_products_of_bf16_operands_equal_the_upcast_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, w = (tensor.detach() for tensor in case(300, 256, 5000, torch.bfloat16))
    results = []
    for upcast in (False, True):
        if upcast:
            monkeypatch.setattr(matmul, "has_fp32_products", lambda operand: False)
        assert matmul.has_fp32_products(w) is not upcast
        logits = matmul.logits_into(torch.empty(300, 5000, device="cuda"), x, w)
        total = torch.ones(w.shape, device="cuda")
        matmul.accumulate_weight_gradient(total, logits.bfloat16(), x)
        results.append((logits, total))
    for mine, theirs in zip(*results, strict=True):
        assert relative(mine, theirs) <= 1e-5


def test_more_logits_than_an_int32_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rows, "BLOCK", 4096)
    rows, width = 2**31 // 152064 + 8, 152064
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    logits = torch.zeros(rows, width, device="cuda")
    logits[-4:] = torch.randn(4, width, device="cuda")
    local = torch.arange(rows, device="cuda") % width
    tail = logits[-4:].clone()
    whole, end = Logits(logits, local, width, 1.0), Logits(tail, local[-4:], width, 1.0)
    far, near = triton_rows.statistics(whole, True), triton_rows.statistics(end, True)
    assert all(torch.equal(a[-4:], b) for a, b in zip(far, near, strict=True))
    softmax = softmax_of(far, local)
    one = torch.ones(rows, device="cuda")
    gradient = triton_rows.write_gradient(whole, softmax, one, None, torch.bfloat16)[-4:].clone()
    last = softmax_of(near, local[-4:])
    assert torch.equal(
        gradient, triton_rows.write_gradient(end, last, one[-4:], None, torch.bfloat16)
    )


def softmax_of(statistics: Statistics, local: torch.Tensor) -> Softmax:
    return merge(statistics, local, True, None)


def test_the_kernel_that_writes_over_its_input_has_no_race() -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the path")
    code = """
import torch
from megatron_efr.kernels import triton_rows
from megatron_efr.kernels.row_kernels import Logits, merge
logits = Logits(torch.randn(4, 20000, device="cuda"), torch.arange(4, device="cuda"), 20000, 1.0)
softmax = merge(triton_rows.statistics(logits, True), logits.targets, True, None)
g = torch.ones(4, device="cuda")
triton_rows.write_gradient(logits, softmax, g, g, torch.bfloat16)
torch.cuda.synchronize()
"""
    # racecheck watches shared memory; memcheck finds a store outside the rows
    for tool in ("racecheck", "memcheck"):
        done = subprocess.run(
            [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code],
            capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
            timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:]


def test_aliased_gradient_equals_the_gradient_written_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """racecheck sees no races in global memory: here they would show as differences, over many
    rows.
    """
    monkeypatch.setattr(triton_rows, "BLOCK", 4096)
    logits = torch.randn(2048, 50000, device="cuda")
    local = torch.arange(2048, device="cuda")
    softmax = softmax_of(triton_rows.statistics(Logits(logits, local, 50000, 1.0), True), local)
    g = torch.linspace(-1, 1, 2048, device="cuda")

    def written(dtype: torch.dtype) -> torch.Tensor:
        return triton_rows.write_gradient(
            Logits(logits.clone(), local, 50000, 1.0), softmax, g, g, dtype
        )

    elsewhere = written(torch.float32)
    for _ in range(20):
        over = written(torch.bfloat16)
        assert torch.equal(over, elsewhere.to(torch.bfloat16))
