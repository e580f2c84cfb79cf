"""RMSNorm, SwiGLU and rotary embedding that keep at most their input for the gradient, and compute
the rest again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from megatron_efr.compiled import loops_for

# bytes of rows that a core's cache holds several times over, as whole tensors would not be
_BLOCK = 1 << 18


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with Megatron's constructor, and a weight that Megatron reduces under
    sequence parallelism.

    Megatron's own wrapper refuses sequence parallelism, so this one stands in for it everywhere,
    the final norm too. On a GPU torch's kernel computes it. On a CPU torch would keep the result
    before the weight too, in bfloat16 it and the input as float32, and read each anew from memory.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.is_cuda else _RMSNorm.apply(x, self.weight, self.eps)


def swiglu(both: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) * up [..., ffn] of [..., 2 * ffn], which holds both (Shazeer 2020, GLU Variants
    Improve Transformer, section 2).
    """
    return _SwiGLU.apply(both)


def use_swiglu(model: torch.nn.Module) -> None:
    """Have the model's MLPs compute theirs so: Megatron would keep SiLU(gate) and a copy of up too.

    Not if `model.megatron` fuses it, or changes what it computes.
    """
    for module in model.modules():
        if not isinstance(module, MLP):
            continue
        config = module.config
        changed = config.glu_linear_offset or config.activation_func_clamp_value is not None
        if not (config.bias_activation_fusion or changed):
            module.activation_func = swiglu
            # Megatron's name for a function that is given gate and up
            config.use_te_activation_func = True


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [tokens, heads, dim] by cos and sin [tokens, 1, dim], whose halves are
    alike (Su et al. 2021, RoFormer, eq. 34, halves for pairs).
    """
    return _Rotation.apply(x, cos, sin)


class _RMSNorm(torch.autograd.Function):
    """x [..., hidden] / rms(x) * weight, computed in float32 (or wider): by compiled loops, or a
    block of rows at a time with the bits of torch's.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        # a copy of what is part of a larger tensor, as a head's keys are: that is not kept for them
        rows = x.detach().flatten(0, -2).contiguous()
        inverse = rows.new_empty(len(rows), 1, dtype=wide)
        if loops := loops_for(rows, weight):
            ctx.save_for_backward(rows, weight, inverse)
            return loops.rms_norm(rows, weight, eps, inverse[:, 0]).view(x.shape)
        result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        factor = weight.to(wide)
        for part, out, scale in _blocks(rows, result.flatten(0, -2), inverse):
            held = part.to(wide, copy=True)
            torch.mean(held * held, -1, keepdim=True, out=scale)
            scale.add_(eps).rsqrt_()
            out.copy_(held.mul_(scale).mul_(factor))
        ctx.save_for_backward(rows, weight, inverse)
        return result

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        rows, weight, inverse = ctx.saved_tensors
        d_rows, factor = grads[0].flatten(0, -2), weight.to(inverse.dtype)
        # none for adapters' models, whose norms are frozen
        d_weight = torch.zeros_like(factor) if ctx.needs_input_grad[1] else None
        if loops := loops_for(rows, weight, d_rows):
            d_x = loops.rms_norm_gradient(rows, weight, inverse[:, 0], d_rows, d_weight)
            d_weight = None if d_weight is None else d_weight.to(weight.dtype)
            return d_x.view(grads[0].shape), d_weight, None
        d_x = torch.empty_like(rows)
        for part, scale, given, out in _blocks(rows, inverse, d_rows, d_x):
            normed = part * scale
            change = given.to(inverse.dtype, copy=True)
            both = change * normed
            if d_weight is not None:
                d_weight += both.sum(0)
            # what of the change is along the row, which its norm takes away
            along = both.mul_(factor).mean(-1, keepdim=True)
            out.copy_(change.mul_(factor).addcmul_(normed, along, value=-1).mul_(scale))
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        return d_x.view(grads[0].shape), d_weight, None


class _SwiGLU(torch.autograd.Function):
    """The operations that autograd would do, or compiled loops."""

    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(both)
        if loops := loops_for(both):
            return loops.swiglu(both)
        gate, up = both.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> torch.Tensor:
        (both,) = ctx.saved_tensors
        if loops := loops_for(both, grads[0]):
            return loops.swiglu_gradient(both, grads[0])
        gate, up = both.chunk(2, dim=-1)
        d_both = torch.empty_like(both)
        d_gate, d_up = d_both.chunk(2, dim=-1)
        torch.mul(silu(gate), grads[0], out=d_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=d_gate)
        return d_both


class _Rotation(torch.autograd.Function):
    """Rotary embedding; its gradient is rotated back, and nothing of it is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x.detach(), cos, sin)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, -sin), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    if loops := loops_for(x, cos, sin):
        return loops.rotate(x, cos, sin)
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((-second, first), dim=-1), sin)


def _blocks(rows: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same rows of all, as many at a time as stay in the cache."""
    size = max(1, _BLOCK // (4 * rows.shape[1]))
    return zip(*(each.split(size) for each in (rows, *others)), strict=True)
