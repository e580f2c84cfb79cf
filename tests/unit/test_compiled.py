"""Compiled loops: whose tensors they take, a step's attention, and the gradient of logits, against
float64. (Norms, SwiGLU and rotary embedding: policy/test_recomputed.py.)
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit
from numba.core import codegen
from torch.nn.functional import scaled_dot_product_attention

from megatron_efr import compiled
from megatron_efr.compiled import loops, loops_for
from megatron_efr.kernels import torch_rows
from megatron_efr.kernels.row_kernels import ELSEWHERE, OUTSIDE, Logits, Softmax, merge

NARROW_AND_WIDE = [torch.float32, torch.bfloat16]


def drawn(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_they_take_float32_and_bfloat16_of_a_cpu_in_one_thread() -> None:
    x = torch.ones(2)
    assert loops_for(x, x.bfloat16()) is loops
    assert loops_for(x, x.double()) is None
    assert loops_for(x.half()) is None
    assert loops_for(x.to("meta")) is None
    torch.set_num_threads(2)
    try:
        assert loops_for(x) is None
    finally:
        torch.set_num_threads(1)


def test_without_numba_torch_computes() -> None:
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch; torch.set_num_threads(1)\n"
        "from megatron_efr.compiled import loops_for\n"
        "print(loops_for(torch.ones(2)))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "None\n"


def test_where_nothing_can_be_kept_loops_are_compiled_all_the_same() -> None:
    """Numba has no place for what comes from no file, as where no folder may be written."""
    made: dict[str, Any] = {}
    exec(compile("def twice(x):\n    return 2 * x\n", "<nowhere>", "exec"), made)
    with pytest.raises(RuntimeError, match="cannot cache function 'twice'"):
        njit(cache=True)(made["twice"])
    assert loops._loop(made["twice"])(21) == 42


def test_importing_the_package_of_loops_imports_no_numba() -> None:
    code = "import sys, megatron_efr.compiled; print('numba' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
    assert compiled._loops() is loops


def test_exponentials_are_float64s_within_a_unit() -> None:
    x = torch.linspace(-87.2, 88.0, 20_001)
    found = torch.tensor([float(loops._exp(value)) for value in x.numpy()])
    assert ((found.double() / x.double().exp() - 1).abs() <= 2**-23).all()
    ends = [float(loops._exp(np.float32(value))) for value in (-np.inf, -88, 0, 89, np.inf)]
    assert ends == [0.0, 0.0, 1.0, ends[4], pytest.approx(math.exp(88), rel=1e-6)]
    assert math.isnan(loops._exp(np.float32(np.nan)))


def angles(dtype: torch.dtype, n: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    turns = drawn(torch.float32, n, 1, width // 2).repeat(1, 1, 2)
    return turns.cos().to(dtype), turns.sin().to(dtype)


@pytest.mark.parametrize("dtype", NARROW_AND_WIDE)
@pytest.mark.parametrize(
    ("heads", "groups", "width"), [(9, 3, 64), (14, 2, 64), (4, 4, 16), (2, 1, 2), (3, 1, 34)]
)
def test_a_steps_attention_is_float64s(
    dtype: torch.dtype, heads: int, groups: int, width: int
) -> None:
    lengths = [1, 2, 3, 4, 5, 63, 64]  # this token's included; the last fills the cache
    n, capacity = len(lengths), 64
    cos, sin = angles(dtype, n, width)
    qkv = drawn(dtype, n, heads + 2 * groups, width)
    # a row that no sequence has, and what an earlier sequence has left behind
    cache = drawn(dtype, 2, n + 1, groups, capacity, width) * 3
    before = cache.clone()
    attend = loops.attention(torch.tensor(lengths) - 1, cos, sin, heads)
    found = attend(qkv, cache).view(n, heads, width)
    for i, length in enumerate(lengths):
        turned = qkv[i, : heads + groups].double()
        first, second = turned.chunk(2, -1)
        turned = turned * cos[i].double() + torch.cat((-second, first), -1) * sin[i].double()
        # in the cache: the new key and value, rounded once, and nothing else has changed
        before[0, i, :, length - 1] = cache[0, i, :, length - 1]
        before[1, i, :, length - 1] = qkv[i, heads + groups :]
        error = (cache[0, i, :, length - 1].double() - turned[heads:]).abs()
        assert (error <= torch.finfo(dtype).eps * turned.abs().max()).all()
        right = scaled_dot_product_attention(
            turned[:heads, None], *cache[:, i, :, :length].double(), enable_gqa=True
        )[:, 0]
        limit = (2e-6 if dtype == torch.float32 else 4e-3) * right.abs().max()
        assert ((found[i].double() - right).abs() <= limit).all()
    assert torch.equal(cache, before)


def test_attention_keeps_a_cache_of_another_dtype() -> None:
    """bfloat16 weights beside float32 keys, on a processor that does not multiply bfloat16."""
    cos, sin = angles(torch.bfloat16, 2, 16)
    qkv, cache = drawn(torch.bfloat16, 2, 4, 16), drawn(torch.float32, 2, 2, 1, 32, 16)
    wide = cache.clone()
    positions = torch.tensor([9, 30])
    found = loops.attention(positions, cos, sin, 2)(qkv, cache)
    right = loops.attention(positions, cos.float(), sin.float(), 2)(qkv.float(), wide)
    assert found.dtype == torch.bfloat16
    assert torch.equal(cache, wide)
    torch.testing.assert_close(found.float(), right, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 15, 17, 30])
def test_keys_behind_the_last_do_not_count_however_large(length: int) -> None:
    """Least of all as the largest product, which all weights are relative to: they would be 0."""
    cos, sin = angles(torch.float32, 1, 16)
    qkv, cache = drawn(torch.float32, 1, 4, 16), drawn(torch.float32, 2, 1, 1, 32, 16)
    larger = cache.clone()
    larger[..., length:, :] = 1e6 * qkv[0, 0]
    attend = loops.attention(torch.tensor([length - 1]), cos, sin, 2)
    assert torch.equal(attend(qkv, larger), attend(qkv, cache))


def test_a_row_of_attention_is_that_of_the_row_alone() -> None:
    cos, sin = angles(torch.float32, 8, 32)
    qkv, cache = drawn(torch.float32, 8, 10, 32), drawn(torch.float32, 2, 8, 2, 64, 32)
    positions = torch.arange(8) * 7
    alone = [
        loops.attention(positions[i : i + 1], cos[i : i + 1], sin[i : i + 1], 6)(
            qkv[i : i + 1], cache[:, i : i + 1].clone()
        )
        for i in range(8)
    ]
    assert torch.equal(loops.attention(positions, cos, sin, 6)(qkv, cache), torch.cat(alone))


@pytest.mark.parametrize("dtype", NARROW_AND_WIDE)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_the_gradient_of_logits_is_that_of_torchs_operations_and_of_float64(
    dtype: torch.dtype, entropy: bool, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns, padding, scale = 5000, 24, 1 / 0.7
    values = 3 * drawn(torch.float32, 7, columns + padding) + offset
    values[3, 17] = -torch.inf
    targets = torch.tensor([0, 2047, 2048, 4999, ELSEWHERE, OUTSIDE, 5])
    d_logprob, d_entropy = drawn(torch.float32, 7), drawn(torch.float32, 1, 7)[0]
    d_logprob[6] = d_entropy[6] = 0  # a row that nobody trains
    found = []
    for path in ("loops", "torch"):
        if path == "torch":
            monkeypatch.setattr(torch_rows, "loops_for", lambda *tensors: None)
        logits = Logits(values.clone(), targets, columns, scale)
        softmax = merge(torch_rows.statistics(logits, entropy), targets, entropy, None)
        given = d_entropy if entropy else None
        found.append(torch_rows.write_gradient(logits, softmax, d_logprob, given, dtype).float())
    loops_, torch_ = found
    assert (loops_[:, columns:] == 0).all()
    assert (loops_[6] == 0).all()
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(loops_, torch_, rtol=2 * rounding, atol=1e-6)
    # and by autograd in float64, of rows whose target is here and whose logits are finite: from
    # where float32 has rounded them to
    rows = [0, 1, 2]
    wide = (values[rows, :columns] * scale).double().requires_grad_()
    log_p = torch.log_softmax(wide, -1)
    loss = (d_logprob[rows] * log_p.gather(1, targets[rows, None])[:, 0]).sum()
    if entropy:
        loss = loss - (d_entropy[rows] * (log_p.exp() * log_p).sum(1)).sum()
    [right] = torch.autograd.grad(loss, wide)
    limit = rounding * scale * right.abs() + 2e-6
    assert ((loops_[rows, :columns].double() - scale * right).abs() <= limit).all()


def test_logits_with_gaps_between_rows_are_left_to_torch() -> None:
    wide = drawn(torch.float32, 3, 40)
    targets = torch.tensor([1, 2, 3])
    whole = Logits(wide[:, :20].contiguous(), targets, 20, 1.0)
    softmax = merge(torch_rows.statistics(whole, False), targets, False, None)
    right = torch_rows.write_gradient(whole, softmax, torch.ones(3), None, torch.float32).clone()
    beside = wide[:, 20:].clone()
    parts = Logits(wide[:, :20], targets, 20, 1.0)
    found = torch_rows.write_gradient(parts, softmax, torch.ones(3), None, torch.float32)
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-7)
    assert torch.equal(wide[:, 20:], beside)


def test_a_softmax_of_nan_stays_nan() -> None:
    logits = Logits(torch.zeros(1, 40), torch.tensor([3]), 40, 1.0)
    nan = torch.full((1,), torch.nan)
    softmax = Softmax(nan, nan, nan, None)
    found = torch_rows.write_gradient(logits, softmax, torch.ones(1), None, torch.bfloat16)
    assert found.isnan().all()


_FEATURES = """
import torch
from megatron_efr.compiled import loops_for
torch.set_num_threads(1)
assert loops_for(torch.ones(1)) is not None
import numba
print(numba.core.config.CPU_FEATURES)
"""


@pytest.mark.parametrize("chosen", [None, "+avx2,+fma"])
def test_loops_are_compiled_for_wide_vectors_on_a_processor_with_amx_unless_the_user_chose(
    chosen: str | None, tmp_path: Path
) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    if chosen:
        environment["NUMBA_CPU_FEATURES"] = chosen
    done = subprocess.run(
        [sys.executable, "-c", _FEATURES], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    features = done.stdout.strip()
    if chosen:
        assert features == chosen
    elif torch.cpu._is_amx_tile_supported():
        assert features.endswith(",-prefer-256-bit")
        assert features.startswith(codegen.get_host_cpu_features())
    else:
        assert features == "None"
