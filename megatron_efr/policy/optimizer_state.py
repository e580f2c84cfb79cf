"""Adds what Megatron's optimizers lack to be saved and taken up again exactly, and has torch's Adam
step in one pass on a CPU.

In Megatron-Core 0.16.1 the DistributedOptimizer mixes up a checkpoint's tensors if a bucket ends in
padding. With torch's Adam, if neither Transformer Engine nor apex is there, it cannot resume at
all: it asks for the state of parameters that have not been stepped yet, copies in place into leaves
that require gradients and into a `step` that the checkpoint keeps elsewhere, and leaves all
parameters with one `step` tensor, which then counts every one of them.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

Tensors = dict[int, dict[str, torch.Tensor]]
"""By number of the parameter in Megatron's buffers: `param` (the fp32 master weight), `exp_avg`,
`exp_avg_sq`.
"""


def prepare(part: MegatronOptimizer) -> None:
    """Make a new optimizer one that can be saved, even before its first step."""
    if isinstance(part, DistributedOptimizer) and not part.is_stub_optimizer:
        _count_padding(part)
    _fill_state(part)
    fuse(part)


def fuse(part: MegatronOptimizer) -> None:
    """Have torch's Adam step a CPU's parameters in one pass over memory (it makes six): a fifth of
    the time. What a loaded checkpoint says of it is another machine's.
    """
    if isinstance(part.optimizer, torch.optim.Adam):
        for group in part.optimizer.param_groups:
            on_cpu = all(parameter.device.type == "cpu" for parameter in group["params"])
            group["fused"] = True if on_cpu else None


def _count_padding(part: DistributedOptimizer) -> None:
    """Let buffers and buckets be as long in a checkpoint as they are in memory.

    `fully_reshardable` joins the buckets without their padding, and then looks for each parameter
    at its place with it. Nothing else reads these lengths.
    """
    for buffer in part.buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()


def _fill_state(part: MegatronOptimizer) -> None:
    """Give every parameter the state from which torch's Adam starts, a `step` of its own
    included.
    """
    for parameter in _stepped_by_torch(part):
        zeros = {
            moment: torch.zeros_like(parameter, requires_grad=False)
            for moment in ("exp_avg", "exp_avg_sq")
        }
        part.optimizer.state[parameter] = {"step": torch.zeros((), dtype=torch.float32), **zeros}


def steps_to_host(part: MegatronOptimizer) -> None:
    """Put torch's step counts back into host memory, if it wants them, after all state was moved to
    the GPU.
    """
    for parameter in _stepped_by_torch(part):
        state = part.optimizer.state[parameter]
        state["step"] = state["step"].cpu()


def set_aside(part: MegatronOptimizer, saved: dict[str, Any]) -> Tensors | None:
    """Take the tensors out of a loaded checkpoint if Megatron would stumble over them: see
    `put_tensors`.
    """
    if not _stepped_by_torch(part):
        return None
    if isinstance(part, DistributedOptimizer):
        return saved.pop("param_state")
    # a plain optimizer saves no step count while it is 0, and torch asks for one
    saved.get("optimizer", saved)["state"].setdefault(
        "common_step", torch.zeros((), dtype=torch.float32)
    )
    return None


@torch.no_grad()
def put_tensors(part: DistributedOptimizer, tensors: Tensors) -> None:
    """Load them, once the rest of the checkpoint (with the step count) has been."""
    states = [part.optimizer.state[parameter] for parameter in _stepped_by_torch(part)]
    steps = [state.pop("step") for state in states]
    part.load_parameter_state_from_fully_reshardable(tensors)
    for state, step in zip(states, steps, strict=True):
        state["step"] = step.clone()


def _stepped_by_torch(part: MegatronOptimizer) -> list[torch.Tensor]:
    """The parameters that torch's Adam steps in this part; none if there is another optimizer, or
    none.
    """
    if not isinstance(part.optimizer, torch.optim.Adam):
        return []
    return [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
