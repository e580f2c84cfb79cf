"""Process groups: the only place that makes them. Everything else is handed what it needs."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_efr.config import ParallelConfig
from megatron_efr.policy import cpu
from megatron_efr.types import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks. `cpu_world` and `cpu_pipeline` are gloo groups: their
    waits outlast NCCL's.

    `all_replicas`: which replica each rank belongs to.
    """

    rank: int
    world_size: int
    device: torch.device
    cpu_world: dist.ProcessGroup
    cpu_pipeline: dist.ProcessGroup
    all_replicas: tuple[int, ...] = (0,)
    wait_limit: timedelta = timedelta(hours=6)  # of those two groups

    @property
    def is_main(self) -> bool:
        """Rank 0 owns prompts, engines, journal and terminal."""
        return self.rank == 0

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        return _group(parallel_state.get_tensor_model_parallel_group())

    @property
    def tensor_ranks(self) -> int:
        return parallel_state.get_tensor_model_parallel_world_size()

    @property
    def tensor_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_rank()

    @property
    def replica_group(self) -> dist.ProcessGroup:
        """The ranks of all tensor and pipeline positions, and of all experts: together they hold
        one whole model.
        """
        return _group(parallel_state.get_expert_tensor_model_pipeline_parallel_group())

    @property
    def context_group(self) -> dist.ProcessGroup:
        """The ranks that hold slices of the same sequences."""
        return _group(parallel_state.get_context_parallel_group())

    @property
    def context_ranks(self) -> int:
        return parallel_state.get_context_parallel_world_size()

    @property
    def context_rank(self) -> int:
        return parallel_state.get_context_parallel_rank()

    @property
    def expert_rank(self) -> int:
        """Number of this rank's share of every layer's experts, from 0."""
        return parallel_state.get_expert_model_parallel_rank()

    @property
    def expert_ranks(self) -> int:
        return parallel_state.get_expert_model_parallel_world_size()

    @property
    def data_group(self) -> dist.ProcessGroup:
        return _group(parallel_state.get_data_parallel_group())

    @property
    def replica(self) -> int:
        """Number of the data-parallel replica that this rank belongs to, from 0."""
        return parallel_state.get_data_parallel_rank()

    @property
    def replicas(self) -> int:
        return parallel_state.get_data_parallel_world_size()

    @property
    def pipeline_ranks(self) -> int:
        return parallel_state.get_pipeline_model_parallel_world_size()

    @property
    def is_last_stage(self) -> bool:
        return parallel_state.is_pipeline_last_stage(ignore_virtual=True)

    def share(self, make: Callable[[], T], what: str = "the next result") -> T:
        """Run `make` on rank 0 and hand its result to every rank; an exception there is raised on
        all.

        UserError names `what` on ranks that have waited for it longer than `wait_limit`, or in
        vain.
        """
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = make()
            except Exception as error:  # the others must not wait for what will never come
                outcome[1] = error
        if self.world_size > 1:
            if self.is_main and outcome[1] is not None:
                dist.broadcast_object_list(
                    [None, _portable(outcome[1])], src=0, group=self.cpu_world
                )
            else:
                with self._waiting_for(what):
                    dist.broadcast_object_list(outcome, src=0, group=self.cpu_world)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def on_main(self, make: Callable[[], T], what: str = "the next result") -> T | None:
        """Run `make` on rank 0 alone, which keeps the result; an exception there is raised on all,
        as in `share`.
        """
        kept: list[T] = []

        def keep() -> None:
            kept.append(make())

        self.share(keep, what)
        return kept[0] if kept else None

    def scatter(self, parts: SequenceOf[SequenceOf[torch.Tensor]]) -> list[torch.Tensor]:
        """Rank 0's CPU tensors `parts[replica]`, on the ranks of that replica, over gloo; other
        ranks give nothing.
        """
        kinds = self.share(
            lambda: [[(tensor.shape, tensor.dtype) for tensor in part] for part in parts]
        )
        if self.is_main:
            others = [
                (rank, replica)
                for rank, replica in enumerate(self.all_replicas)
                if rank != self.rank
            ]
            sent = [(t, rank) for rank, replica in others for t in parts[replica] if t.numel()]
            for work in [dist.isend(tensor, rank, group=self.cpu_world) for tensor, rank in sent]:
                assert work is not None
                work.wait()
            return list(parts[self.replica])
        received = [torch.empty(shape, dtype=dtype) for shape, dtype in kinds[self.replica]]
        for tensor in received:
            if tensor.numel():
                dist.recv(tensor, 0, group=self.cpu_world)
        return received

    @contextmanager
    def _waiting_for(self, what: str) -> Iterator[None]:
        """Says what was waited for: gloo says only that it waited, or that its peer has gone."""
        began = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if self.is_main:  # it waited for nothing: another rank has gone
                raise
            waited = time.monotonic() - began
            limit = self.wait_limit.total_seconds()
            why = (
                "the limit is parallel.wait_limit_s"
                if waited >= 0.99 * limit
                else "rank 0 has ended"
            )
            raise UserError(
                f"rank {self.rank} waited {waited:.0f} s for {what} of rank 0: {why} ({error})"
            ) from error

    def everywhere(self, holds: bool) -> bool:
        """True if it holds on every rank."""
        held = torch.tensor(int(holds))
        if self.world_size > 1:
            dist.all_reduce(held, op=dist.ReduceOp.MIN, group=self.cpu_world)
        return bool(held)

    def total(self, number: int) -> int:
        """`number` summed over all ranks."""
        summed = torch.tensor(number)
        if self.world_size > 1:
            dist.all_reduce(summed, group=self.cpu_world)
        return int(summed)

    def largest(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Each figure's maximum over the ranks that have it."""
        everyone: list[Any] = [dict(figures)] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(everyone, dict(figures), group=self.cpu_world)
        names = sorted({name for own in everyone for name in own})
        return {name: max(own[name] for own in everyone if name in own) for name in names}

    def sum_over_replicas(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor`, of any shape, over data-parallel replicas, in place; a collective."""
        if self.replicas > 1:
            dist.all_reduce(tensor, group=self.data_group)
        return tensor

    def from_last_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """The last stage's `tensor` on every stage: CPU tensors alike in shape, over gloo."""
        if self.pipeline_ranks > 1:
            source = dist.get_process_group_ranks(self.cpu_pipeline)[-1]
            dist.broadcast(tensor, src=source, group=self.cpu_pipeline)
        return tensor

    def barrier(self) -> None:
        """Wait for every rank, on the CPU."""
        if self.world_size > 1:
            dist.barrier(group=self.cpu_world)


@contextmanager
def join_ranks(parallel: ParallelConfig, seed: int) -> Iterator[Ranks]:
    """Join the ranks that torchrun started (or be the only one), split them as configured, and
    leave at the end.

    A process that has joined its world already stays in it: it may be split anew, one layout after
    the other.
    """
    # the world, unless somebody has joined it already
    device = _device()
    joined = dist.is_initialized()
    if not joined:
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:  # without torchrun the program is a world of one
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if device.type == "cpu":
        cpu.prepare()
    # Megatron's groups, and random numbers
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
    )
    model_parallel_cuda_manual_seed(seed, inference_rng_tracker=True, force_reset_rng=True)
    torch.manual_seed(seed)
    # groups over gloo beside them, for what is no tensor on a GPU
    wait_limit = timedelta(seconds=parallel.wait_limit_s)
    try:
        yield Ranks(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            device=device,
            cpu_world=_group(dist.new_group(backend="gloo", timeout=wait_limit)),
            cpu_pipeline=_pipeline_over_gloo(wait_limit),
            all_replicas=_all_replicas(),
            wait_limit=wait_limit,
        )
    finally:
        # a world that somebody else joined is theirs to leave
        parallel_state.destroy_model_parallel()
        if not joined:
            dist.destroy_process_group()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _all_replicas() -> tuple[int, ...]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, parallel_state.get_data_parallel_rank())
    return tuple(everyone)


def _pipeline_over_gloo(wait_limit: timedelta) -> dist.ProcessGroup:
    """This rank's pipeline peers as a gloo group; every rank takes part in making all of them."""
    mine = dist.get_process_group_ranks(_group(parallel_state.get_pipeline_model_parallel_group()))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    distinct = sorted({tuple(ranks) for ranks in everyone})
    groups = {
        ranks: dist.new_group(list(ranks), backend="gloo", timeout=wait_limit) for ranks in distinct
    }
    return _group(groups[tuple(mine)])


def _group(group: Any) -> dist.ProcessGroup:
    """torch and Megatron annotate their groups with what this rank cannot be: a non-member, or a
    list.
    """
    return cast(dist.ProcessGroup, group)


def _portable(error: Exception) -> Exception:
    """The error if it can cross to other processes, else its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"rank 0: {type(error).__name__}: {error}")
    return error
