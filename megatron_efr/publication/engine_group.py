"""Rank 0's end of a process group with engine ranks, which it can leave without them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_efr.errors import LostError


class EngineGroup:
    """Rank 0 of a group beside the default one, named as SGLang's `init_custom_process_group` names
    it.

    torch has no public function for a group with processes outside its world; that one uses the
    same two.
    """

    def __init__(
        self,
        name: str,
        backend: str,
        address: str,
        port: int,
        world: int,
        limit: timedelta,
        joining: Future[None],
    ) -> None:
        """Wait until the other `world - 1` ranks have entered it, which `joining` has asked of
        them; dist.DistError if they have not within `limit`, which each broadcast has as well.
        """
        store = dist.TCPStore(
            address, port, world, is_master=True, timeout=limit, wait_for_workers=False
        )
        make: Any = distributed_c10d._new_process_group_helper
        kind = distributed_c10d.Backend(backend)
        group, _ = make(
            world, 0, [], kind, dist.PrefixStore(name, store), group_name=name, timeout=limit
        )
        distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
        joining.result()
        self.name = name
        self._group: dist.ProcessGroup | None = group
        self._sending: list[dist.Work] = []

    def send(self, tensors: Sequence[torch.Tensor]) -> None:
        """Begin to broadcast `tensors`, which must live until `wait` returns."""
        for tensor in tensors:
            work = dist.broadcast(tensor, group=self._group, group_src=0, async_op=True)
            assert work is not None
            self._sending.append(work)

    def wait(self) -> None:
        """Until what `send` began is sent; LostError if a rank has left."""
        try:
            while self._sending:
                self._sending.pop().wait()
        except RuntimeError as error:
            raise LostError(f"weights group {self.name}: {error}") from error

    def leave(self) -> None:
        """End the connections: a rank that waits for this one in a broadcast fails in it instead.

        NCCL's end by `abort`, which other ranks notice as their NCCL does. Gloo's `abort` does
        nothing: its connections end with the last reference to the group, and that not before what
        is being sent has failed or been taken. So nobody but this object may refer to the group or
        its work, and ranks that take nothing must leave as well.
        """
        group = self._group
        self._group = None
        self._sending.clear()
        distributed_c10d._abort_process_group(group)
