"""Megatron-Core and torch on a machine without a GPU: the one module that patches them, and refuses
if CUDA is present. (What `publication/transports.py` puts back is torch's own.)

Megatron-Core 0.16.1 and 0.19.2 name the device "cuda" in places that no option reaches. Each patch
below answers one of them, in both.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import utils as megatron_utils
from megatron.core.optimizer import clip_grads, grad_scaler, optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import layers, mappings
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_efr.bfloat16_products import multiplied
from megatron_efr.kernels.matmul import accumulate_weight_gradient

_WITH_LITERAL_DEVICE = (schedules, optimizer, clip_grads, grad_scaler, megatron_utils)
# torch's products, and how many of their results have the operands' dtype
_ATTENTION_BACKWARD = {"_scaled_dot_product_flash_attention_for_cpu_backward": 3}
_PRODUCTS = _ATTENTION_BACKWARD | {
    "mm": 1,
    "addmm": 1,
    "bmm": 1,
    "baddbmm": 1,
    "_scaled_dot_product_flash_attention_for_cpu": 1,
}
# tokens from which on it is as fast in bfloat16, if the processor multiplies that
_BFLOAT16_BACKWARD = 512


def prepare() -> None:
    """Patch Megatron for this process, once. RuntimeError if there is a GPU to use instead."""
    if torch.cuda.is_available():
        raise RuntimeError(
            "CPU support was asked for on a machine with CUDA; hide the devices with "
            "CUDA_VISIBLE_DEVICES="
        )
    if isinstance(schedules.torch, _TorchOnCpu):
        return
    # what Megatron calls without asking if there is a device
    _patch("torch.cuda.current_device", torch.cuda, "current_device", lambda: torch.device("cpu"))
    _patch("torch.cuda.synchronize", torch.cuda, "synchronize", lambda *args, **kwargs: None)
    # asked for before every reduction of gradients, to wait for CUDA graphs that there are none of
    # (since 0.19)
    _patch("torch.cuda.current_stream", torch.cuda, "current_stream", lambda *args, **kwargs: None)
    _patch("Tensor.cuda", torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    # only dropout and recomputation fork the "device" generator: here it is the CPU's
    _patch(
        "random state",
        megatron_random,
        "_get_cuda_rng_state",
        lambda *args, **kwargs: torch.get_rng_state(),
    )
    _patch(
        "random state",
        megatron_random,
        "_set_cuda_rng_state",
        lambda state, *args, **kwargs: _set_state(state),
    )
    # the dispatcher makes a stream unless there is one, and waits on it for counts that here are on
    # the host already
    _patch("expert dispatch", MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", "none on a CPU")
    _patch(
        "expert dispatch",
        MoEAlltoAllTokenDispatcher,
        "_maybe_dtoh_and_synchronize",
        _counts_on_host,
    )
    # up to 0.16 imported with Transformer Engine, asked for without it
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]
    # Apex's, which add a weight's gradient to the float32 sum of them as they compute it
    _patch("weights' gradients", layers, "_grad_accum_fusion_available", True)
    layers.fused_weight_gradient_mlp_cuda = _WeightGradients  # type: ignore[attr-defined]
    # with it Transformer Engine, if it is installed, would stand in for the gradient on "cuda"
    _patch("weights' gradients", layers, "HAVE_TE", False)
    # experts under tensor parallelism: each rank routes as many tokens as it likes, and gloo wants
    # as many from all
    _patch(
        "uneven gather",
        mappings,
        "_gather_along_first_dim",
        _uneven_gather(mappings._gather_along_first_dim),
    )
    scatter = _uneven_reduce_scatter(mappings._reduce_scatter_along_first_dim)
    _patch("uneven scatter", mappings, "_reduce_scatter_along_first_dim", scatter)
    # modules that write the device "cuda" out
    for module in _WITH_LITERAL_DEVICE:
        _patch("literal device", module, "torch", _TorchOnCpu())


@functools.cache
def multiply_bfloat16() -> torch.library.Library | None:
    """Have torch compute products of bfloat16 tensors in float32, and round them, where it is the
    faster way, in this process; None if there is CUDA.

    Without bfloat16 instructions (AVX2) torch's own took up to 60 times as long as float32's,
    product by product. With them (AMX) that is so of short sequences' gradients in attention alone:
    2 to 5 times.
    """
    if torch.cuda.is_available():
        return None
    slower, shorter_than = (
        (_ATTENTION_BACKWARD, _BFLOAT16_BACKWARD) if multiplied() else (_PRODUCTS, None)
    )
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():  # that kernels are overridden
        warnings.simplefilter("ignore")
        for name, rounded in slower.items():
            library.impl(name, _in_float32(name, rounded, shorter_than), "CPU", with_keyset=True)
    return library  # what it overrides lasts as long as it


def _in_float32(name: str, rounded: int, shorter_than: int | None) -> Callable[..., Any]:
    """Torch's operator, which turns bfloat16 operands to float32 and the first `rounded` results
    back; with `shorter_than`, of attention over sequences of fewer tokens alone.
    """
    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")

    def product(keys: Any, *given: Any, **options: Any) -> Any:
        long = shorter_than is not None and given[0].shape[-2] >= shorter_than
        if long or given[0].dtype != torch.bfloat16:
            return kernel.call_boxed(keys, *given, **options)
        wide = (each.float() if isinstance(each, torch.Tensor) else each for each in given)
        found = kernel.call_boxed(keys, *wide, **options)
        if isinstance(found, torch.Tensor):
            return found.bfloat16()
        return tuple(each.bfloat16() if n < rounded else each for n, each in enumerate(found))

    return product


@contextmanager
def cuda_type_names() -> Iterator[None]:
    """Within it fp32 CPU tensors call themselves 'torch.cuda.FloatTensor', as Megatron's optimizer
    asserts.

    Does nothing if CUDA is present.
    """
    if torch.cuda.is_available():
        yield
        return
    original = torch.Tensor.type

    @functools.wraps(original)
    def named(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    _patch("type names", torch.Tensor, "type", named)
    try:
        yield
    finally:
        _patch("type names", torch.Tensor, "type", original)


def _counts_on_host(
    dispatcher: Any, point: str, tokens_per_expert: torch.Tensor | None = None
) -> torch.Tensor | None:
    """The counts of the dispatcher's copy to the host: tokens to each rank, as collectives take
    them.
    """
    if point == dispatcher.cuda_dtoh_point:
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            if isinstance(counts := getattr(dispatcher, name), torch.Tensor):
                setattr(dispatcher, name, counts.numpy())
    return tokens_per_expert


def _uneven_gather(even: Any) -> Any:
    """Megatron's gather over dim 0, with a broadcast from every rank if the parts differ in
    size.
    """

    def gather(
        tensor: torch.Tensor,
        group: dist.ProcessGroup,
        sizes: list[int] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return even(tensor, group, None, *args, **kwargs)
        parts = [tensor.new_empty(size, *tensor.shape[1:]) for size in sizes]
        parts[group.rank()].copy_(tensor)
        for rank, part in enumerate(parts):
            dist.broadcast(part, group=group, group_src=rank)
        return torch.cat(parts)

    return gather


def _uneven_reduce_scatter(even: Any) -> Any:
    """Megatron's reduce-scatter over dim 0, with a sum over everything if the parts differ in
    size.
    """

    def scatter(
        tensor: torch.Tensor,
        group: dist.ProcessGroup,
        sizes: list[int] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return even(tensor, group, None, *args, **kwargs)
        whole = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=group)
        # a copy: a view would keep all ranks' sums
        return whole.split(sizes)[group.rank()].clone()

    return scatter


class _WeightGradients:
    """Apex's products of `fused_weight_gradient_mlp_cuda`, by the dtype of the sum."""

    @staticmethod
    def wgrad_gemm_accum_fp32(
        x: torch.Tensor, d_out: torch.Tensor, main_grad: torch.Tensor
    ) -> None:
        accumulate_weight_gradient(main_grad, d_out, x)

    @staticmethod
    def wgrad_gemm_accum_fp16(
        x: torch.Tensor, d_out: torch.Tensor, main_grad: torch.Tensor
    ) -> None:
        main_grad.addmm_(d_out.t(), x)


class _TorchOnCpu(types.ModuleType):
    """The torch module, except that functions called with device="cuda" make their tensor on the
    CPU.
    """

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        return _on_cpu(value) if name in ("zeros", "ones", "tensor", "empty", "full") else value


@functools.cache
def _on_cpu(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)

    return call


def _set_state(state: torch.Tensor) -> None:
    torch.set_rng_state(state)


def _patch(reason: str, owner: Any, name: str, value: Any) -> None:
    if not hasattr(owner, name):
        raise RuntimeError(
            f"CPU support ({reason}): {owner!r} has no {name}; it was written for megatron-core "
            "0.16.1 and 0.19.2"
        )
    setattr(owner, name, value)
