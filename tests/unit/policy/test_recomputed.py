"""RMSNorm and SwiGLU that keep their input alone, against torch's and autograd's own."""

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
from megatron_efr.policy.recomputed import RMSNorm, swiglu
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 4 * 24 * 7, 1 << 18])
def test_a_norm_has_torchs_bits_and_the_gradients_of_float64(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recomputed, "_BLOCK", block)  # a row, 7 of the 30, all
    module, x = norm(dtype, 24), drawn(dtype, 10, 3, 24)
    result = module(x)
    assert torch.equal(result, rms_norm(x, (24,), module.weight, 1e-5))
    wide, weight = exact(x), exact(module.weight)
    back = drawn(dtype, *result.shape).detach()
    wanted = torch.autograd.grad(rms_norm(wide, (24,), weight, 1e-5), (wide, weight), back.double())
    rounding = torch.finfo(dtype).eps
    for mine, right in zip(backward(result, x, module.weight), wanted, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - right).abs().max() <= 4 * rounding * right.abs().max()


def test_heads_of_a_larger_tensor_are_normed_where_they_stand() -> None:
    """As Qwen3's queries are: a view, whose gradient is one too."""
    module, x = norm(torch.float32, 16), drawn(torch.float32, 9, 2, 3 * 16)
    result = module(x[..., 16:32])
    assert torch.equal(result, rms_norm(x[..., 16:32], (16,), module.weight, 1e-5))
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
def test_swiglu_has_the_bits_of_autograds(dtype: torch.dtype) -> None:
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
