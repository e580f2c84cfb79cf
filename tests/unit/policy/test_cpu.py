"""bfloat16 in float32, rounded once, where that is faster: every product if the processor does not
multiply it, and otherwise gradients of attention over short sequences.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from megatron_efr.bfloat16_products import multiplied
from megatron_efr.policy import cpu

cpu.multiply_bfloat16()
AS_WITHOUT = """
import sys, pytest
from megatron_efr import bfloat16_products
bfloat16_products.multiplied = lambda: False
sys.exit(pytest.main([sys.argv[1], "-p", "no:cacheprovider", "-k", "not as_on_a_processor"]))
"""
needs_none = pytest.mark.skipif(multiplied(), reason="this processor multiplies bfloat16")


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).bfloat16()


def rounded_float32(
    function: object, tensors: list[torch.Tensor], back: torch.Tensor
) -> list[torch.Tensor]:
    """Result and gradients of `function` of these tensors in float32, rounded."""
    assert callable(function)
    wide = [each.detach().float().requires_grad_() for each in tensors]
    result = function(*wide)
    result.backward(back.float())
    return [
        each.bfloat16() for each in (result.detach(), *(w.grad for w in wide if w.grad is not None))
    ]


@needs_none
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_and_its_gradients_are_those_of_float32_rounded_once(bias: bool) -> None:
    tensors = [drawn(6, 32, 48), drawn(80, 48), *([drawn(80)] if bias else [])]
    given, back = [each.clone().requires_grad_() for each in tensors], drawn(6, 32, 80)
    result = linear(*given)
    result.backward(back)
    found = [result.detach(), *(each.grad for each in given)]
    wanted = rounded_float32(linear, tensors, back)
    assert len(found) == len(wanted) == 3 + bias
    for mine, exact in zip(found, wanted, strict=True):
        assert mine is not None
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, exact)


@needs_none
def test_batched_products_too() -> None:
    a, b, c = drawn(5, 16, 24), drawn(5, 24, 8), drawn(5, 16, 8)
    assert torch.equal(a @ b, (a.float() @ b.float()).bfloat16())
    wanted = torch.baddbmm(c.float(), a.float(), b.float(), beta=0.5, alpha=2.0).bfloat16()
    assert torch.equal(torch.baddbmm(c, a, b, beta=0.5, alpha=2.0), wanted)


def test_attention_and_its_gradients_are_close_to_float32s() -> None:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    tensors, back = [drawn(2, 3, 40 + 8 * n, 16)[:, :, :40] for n in range(3)], drawn(2, 3, 40, 16)
    given = [each.clone().requires_grad_() for each in tensors]
    result = attention(*given)
    result.backward(back)
    wanted = rounded_float32(attention, tensors, back)
    if multiplied():
        assert (result - wanted[0]).abs().max() <= 2**-6 * wanted[0].abs().max()
    else:
        assert torch.equal(result, wanted[0])
    # the gradients begin with the rounded result
    for each, exact in zip(given, wanted[1:], strict=True):
        assert each.grad is not None
        assert (each.grad - exact).abs().max() <= 2**-6 * exact.abs().max()


def test_gradients_of_attention_over_short_sequences_are_those_of_float32_rounded_once() -> None:
    q, k, v, back = (x for x in drawn(4, 2, 3, 40, 16))
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    out, sums = forward(q, k, v, is_causal=True)
    found = backward(back, q, k, v, out, sums, 0.0, True)
    wide = backward(*(x.float() for x in (back, q, k, v, out)), sums, 0.0, True)
    assert all(torch.equal(mine, exact.bfloat16()) for mine, exact in zip(found, wide, strict=True))


_WITH_TRANSFORMER_ENGINE = """
from megatron.core.tensor_parallel import layers
layers.HAVE_TE = True
from megatron_efr.policy import cpu
cpu.prepare()
print(layers.HAVE_TE, layers.fused_weight_gradient_mlp_cuda.__name__)
"""


def test_transformer_engine_stands_in_for_no_gradient_on_a_device_that_there_is_not() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _WITH_TRANSFORMER_ENGINE],
        capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["False", "_WeightGradients"]


def test_float32_products_are_torchs_own() -> None:
    a, b = drawn(64, 48).float(), drawn(48, 32).float()
    assert torch.equal(a @ b, torch.mm(a, b, out=torch.empty(64, 32)))


@pytest.mark.skipif(not multiplied(), reason="this processor is one that multiplies none")
def test_all_of_it_as_on_a_processor_that_multiplies_no_bfloat16() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", AS_WITHOUT, __file__], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout
    assert "passed" in ran.stdout
    assert "skipped" not in ran.stdout
