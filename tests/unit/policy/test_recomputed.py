"""RMSNorm, SwiGLU and rotary embedding that keep at most their input, by compiled loops and by
torch's operations: against torch's and autograd's own, and float64.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP
from torch.nn.functional import rms_norm, silu

from megatron_efr.bfloat16_products import float32_sums
from megatron_efr.policy import Ranks, recomputed
from megatron_efr.policy.recomputed import RMSNorm, rotated, swiglu
from tests.policies import make_policy

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def drawn(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return made.to(dtype).requires_grad_()


def norm(dtype: torch.dtype, size: int) -> RMSNorm:
    made = RMSNorm(TransformerConfig(num_layers=1, hidden_size=size, num_attention_heads=1), size)
    made.weight.data = drawn(torch.float32, size).detach()
    return made.to(dtype)


def backward(result: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    back = drawn(result.dtype, *result.shape).detach()
    return torch.autograd.grad(result, inputs, back)


def exact(value: torch.Tensor) -> torch.Tensor:
    return value.detach().double().requires_grad_()


def assert_within_rounding(mine: torch.Tensor, right: torch.Tensor, units: float) -> None:
    """Within so many units in the last place of the largest."""
    limit = units * torch.finfo(mine.dtype).eps * right.abs().max()
    assert (mine.double() - right).abs().max() <= limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 4 * 24 * 7, 1 << 18])
def test_a_norm_of_torchs_operations_has_torchs_bits_and_the_gradients_of_float64(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch, without_loops: None
) -> None:
    monkeypatch.setattr(recomputed, "_BLOCK", block)  # a row, 7 of the 30, all
    module, x = norm(dtype, 24), drawn(dtype, 10, 3, 24)
    assert torch.equal(module(x), rms_norm(x, (24,), module.weight, 1e-5))
    assert_norms_gradients(module, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 24, 577])
def test_a_norm_and_its_gradients_are_float64s(dtype: torch.dtype, width: int) -> None:
    module, x = norm(dtype, width), drawn(dtype, 10, 3, width)
    right = rms_norm(exact(x), (width,), exact(module.weight), 1e-5)
    assert_within_rounding(module(x), right, 1)
    assert_norms_gradients(module, x)


def assert_norms_gradients(module: RMSNorm, x: torch.Tensor) -> None:
    result, shape = module(x), module.weight.shape
    wide, weight = exact(x), exact(module.weight)
    back = drawn(x.dtype, *result.shape).detach()
    wanted = torch.autograd.grad(rms_norm(wide, shape, weight, 1e-5), (wide, weight), back.double())
    for mine, right in zip(backward(result, x, module.weight), wanted, strict=True):
        assert mine.dtype == x.dtype
        assert_within_rounding(mine, right, 4)


def test_heads_of_a_larger_tensor_are_normed_where_they_stand() -> None:
    """As Qwen3's queries are: a view, whose gradient is one too."""
    module, x = norm(torch.float32, 16), drawn(torch.float32, 9, 2, 3 * 16)
    result = module(x[..., 16:32])
    assert_within_rounding(
        result, rms_norm(exact(x)[..., 16:32], (16,), exact(module.weight), 1e-5), 1
    )
    [mine] = backward(result.transpose(0, 1), x)
    [wanted] = backward(rms_norm(x[..., 16:32], (16,), module.weight, 1e-5).transpose(0, 1), x)
    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)


def test_a_frozen_norm_passes_its_gradient_on() -> None:
    module, x = norm(torch.float32, 16), drawn(torch.float32, 5, 16)
    [trained] = backward(module(x), x)
    module.weight.requires_grad_(False)
    [frozen] = backward(module(x), x)
    assert torch.equal(trained, frozen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 40, 1003])
def test_swiglu_and_its_gradient_are_float64s(dtype: torch.dtype, width: int) -> None:
    both = drawn(dtype, 11, 3, 2 * width)
    wide = exact(both)
    gate, up = wide.chunk(2, dim=-1)
    right = silu(gate) * up
    assert_within_rounding(swiglu(both), right, 2)
    back = drawn(dtype, *right.shape).detach()
    [wanted] = torch.autograd.grad(right, wide, back.double())
    [mine] = backward(swiglu(both), both)
    assert_within_rounding(mine, wanted, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_of_gates_of_any_size(dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, -0.0, 0.0, 88.0, 200.0, 1e30], dtype=dtype)
    both = torch.cat((gate, torch.ones_like(gate)))[None].requires_grad_()
    torch.testing.assert_close(swiglu(both)[0], silu(gate), rtol=1e-2, atol=1e-6)
    [mine] = torch.autograd.grad(swiglu(both).sum(), both)
    [theirs] = torch.autograd.grad((silu(both[:, :8]) * both[:, 8:]).sum(), both)
    torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_nan_in_its_row_alone(dtype: torch.dtype) -> None:
    x = drawn(dtype, 3, 64).detach()
    x[1, 5] = torch.nan
    for result in (swiglu(x), norm(dtype, 64)(x)):
        assert result[1].isnan().any()
        assert result[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 16, 66])
def test_rotary_embedding_and_its_gradient_are_float64s(dtype: torch.dtype, width: int) -> None:
    """Of a part of a larger tensor, as Megatron's keys are."""
    x = drawn(dtype, 13, 5, width)
    angles = drawn(torch.float32, 13, 1, width // 2).detach().repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    wide = exact(x)
    first, second = wide[:, 1:4].chunk(2, -1)
    right = wide[:, 1:4] * cos + torch.cat((-second, first), -1) * sin
    result = rotated(x[:, 1:4], cos, sin)
    assert_within_rounding(result, right, 2)
    back = drawn(dtype, *right.shape).detach()
    [wanted] = torch.autograd.grad(right, wide, back.double())
    assert_within_rounding(*backward(result, x), wanted, 2)


def test_loops_and_torchs_operations_rotate_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    x, angles = drawn(torch.float32, 13, 3, 32), drawn(torch.float32, 13, 1, 16).detach()
    cos, sin = (turned.repeat(1, 1, 2) for turned in (angles.cos(), angles.sin()))
    loops = rotated(x, cos, sin)
    monkeypatch.setattr(recomputed, "loops_for", lambda *tensors: None)
    torch.testing.assert_close(loops, rotated(x, cos, sin), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_of_torchs_operations_has_the_bits_of_autograds(
    dtype: torch.dtype, without_loops: None
) -> None:
    both = drawn(dtype, 11, 3, 2 * 40)
    gate, up = both.chunk(2, dim=-1)
    theirs = silu(gate) * up
    assert torch.equal(swiglu(both), theirs)
    assert torch.equal(*backward(swiglu(both), both), *backward(theirs, both))


def test_a_norms_gradient_is_the_same_while_another_thread_multiplies_bfloat16() -> None:
    # as large as torch multiplies with oneDNN, which alone knows that setting
    module, x = norm(torch.bfloat16, 576), drawn(torch.bfloat16, 684, 576)
    alone = backward(module(x), x, module.weight)
    with float32_sums(torch.bfloat16):
        beside = backward(module(x), x, module.weight)
    assert all(torch.equal(one, other) for one, other in zip(alone, beside, strict=True))


def kept_bytes(function: Callable[[], object]) -> int:
    """Of the storages that autograd keeps for what `function` computes."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        results = function()  # held, or a later storage could have an earlier one's address
    total = sum(kept.values())
    del results
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_keep_their_input_alone(dtype: torch.dtype) -> None:
    module, x, both = norm(dtype, 64), drawn(dtype, 100, 64), drawn(dtype, 100, 2 * 96)
    inputs = sum(each.untyped_storage().nbytes() for each in (x, module.weight, both))
    assert kept_bytes(lambda: (module(x), swiglu(both))) == inputs + 4 * 100
    # keys beside queries and values: a part of a tensor does not keep the whole
    keys = both[:, 64:128]
    part = 64 * 100 * dtype.itemsize
    assert kept_bytes(lambda: module(keys)) == part + 64 * dtype.itemsize + 4 * 100
    # rotary embedding keeps its angles, which all layers share
    heads, angles = drawn(dtype, 100, 3, 16), torch.zeros(100, 1, 16, dtype=dtype)
    assert kept_bytes(lambda: rotated(heads, angles, angles)) == angles.untyped_storage().nbytes()


def test_no_tokens_are_nothing_to_do() -> None:
    """As an expert has that nobody chose."""
    both, x = drawn(torch.float32, 0, 2 * 8), drawn(torch.float32, 0, 8)
    [d_both] = torch.autograd.grad(swiglu(both).sum(), both)
    [d_x] = torch.autograd.grad(norm(torch.float32, 8)(x).sum(), x)
    assert (d_both.shape, d_x.shape) == (both.shape, x.shape)


@pytest.mark.parametrize(
    ("field", "ours"),
    [({}, True), ({"glu_linear_offset": 1.0}, False), ({"bias_activation_fusion": True}, False)],
)
def test_models_have_it_unless_theirs_is_another(
    untied_model: Path, ranks: Ranks, field: dict[str, object], ours: bool
) -> None:
    policy = make_policy(untied_model, ranks, megatron=field)
    mlps = [each for each in policy.chunks[0].modules() if isinstance(each, MLP)]
    assert [each.activation_func is swiglu for each in mlps] == [ours] * policy.config.num_layers
