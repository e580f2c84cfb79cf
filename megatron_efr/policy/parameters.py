"""The policy's parameters by their names in the whole model: loaded, exchanged, gathered into whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model

from megatron_efr.policy.model import PolicyModel
from megatron_efr.policy.ranks import Ranks
from megatron_efr.weights.folder import TensorSource
from megatron_efr.weights.mapping import WeightMapping


class _Place(NamedTuple):
    """Where a parameter lives: the first rank of its tensor-parallel group, and its shard's shape and type."""

    holder: int
    shape: torch.Size
    dtype: torch.dtype


class Parameters:
    """This rank's parameters by canonical name (`WeightMapping.parameters`), layers and experts counted globally."""

    def __init__(self, chunks: Sequence[torch.nn.Module], mapping: WeightMapping, ranks: Ranks) -> None:
        self._mapping, self._ranks = mapping, ranks
        self._chunks = chunks
        self._tensor_members = dist.get_process_group_ranks(ranks.tensor_group)
        self._local = [pair for chunk in chunks for pair in self._named(cast(PolicyModel, unwrap_model(chunk)))]
        self._places = self._agree_on_places()

    def _named(self, model: PolicyModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                layer: Any = model.decoder.layers[int(parts[2])]
                parts[2] = str(layer.layer_number - 1)
            yield self._mapping.canonical(".".join(parts)), parameter

    def _agree_on_places(self) -> dict[str, _Place]:
        """Every parameter's place; where several ranks hold one (replicas, tied embeddings), the first."""
        mine = {name: _Place(self._ranks.rank, p.shape, p.dtype) for name, p in self._local}
        everyone: list[Any] = [None] * self._ranks.world_size
        dist.all_gather_object(everyone, mine if self._ranks.tensor_rank == 0 else {}, group=self._ranks.cpu_world)
        return {name: place for places in reversed(everyone) for name, place in places.items()}

    @torch.no_grad()
    def load(self, source: TensorSource) -> None:
        """Copy this rank's shards from whole Hugging Face tensors, read one parameter at a time."""
        for name, parameter in self._local:
            tensors = {hf: source[hf] for hf in self._mapping.sources(name)}
            parameter.copy_(self._mapping.to_megatron(name, tensors, self._ranks.tensor_rank))

    def finish_gather(self) -> None:
        """Wait until every weight is whole.

        Under `overlap_param_gather` an updated weight comes from the other replicas when a forward pass calls the
        module that holds it; who reads weights in another way calls this first. All replicas together.
        """
        for chunk in cast(Sequence[DistributedDataParallel], self._chunks):
            if chunk.use_forward_hook:
                for group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
                    group.finish_param_sync(skip_next_bucket_dispatch=True)

    def copies(self) -> list[torch.Tensor]:
        """A copy of every local parameter, in host memory."""
        self.finish_gather()
        return [parameter.detach().to("cpu", copy=True) for _, parameter in self._local]

    @torch.no_grad()
    def exchange(self, values: list[torch.Tensor]) -> list[torch.Tensor]:
        """Put `values` (as `copies` gave them) into the parameters; returns what stood there, in host memory."""
        self.finish_gather()
        before = []
        for (_, parameter), value in zip(self._local, values, strict=True):
            before.append(parameter.detach().to("cpu", copy=True))
            parameter.copy_(value)
        return before

    def whole(
        self, of: Callable[[torch.nn.Parameter], torch.Tensor] = torch.Tensor.detach
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, whole tensor) pairs in the mapping's order, one Megatron parameter in memory at a time.

        All ranks iterate together. Rank 0 gets the tensors (views of the live parameters where nothing is split), the
        others empty ones under the same names. `of` may name something else than a parameter's value, of its shape.
        """
        self.finish_gather()
        local = {name: of(parameter) for name, parameter in self._local}
        for name in self._mapping.parameters():
            shards = self._shards_on_main(name, local.get(name))
            if shards is None:
                yield from ((source, torch.empty(0)) for source in self._mapping.sources(name))
            else:
                yield from self._mapping.to_hugging_face(name, shards)

    def _shards_on_main(self, name: str, parameter: torch.Tensor | None) -> list[torch.Tensor] | None:
        """Every tensor-parallel shard of a parameter, brought to rank 0; None elsewhere."""
        ranks, place = self._ranks, self._places[name]
        count = ranks.tensor_ranks if self._mapping.is_sharded(name) else 1
        shards = []
        if place.holder == self._tensor_members[0]:
            assert parameter is not None
            shards = [parameter]
            if count > 1:
                shards = [torch.empty_like(parameter) for _ in range(count)]
                dist.all_gather(shards, parameter.contiguous(), group=ranks.tensor_group)
            if ranks.rank == place.holder != 0:
                for shard in shards:
                    dist.send(shard.contiguous(), dst=0)
        elif ranks.is_main:
            shards = [torch.empty(place.shape, dtype=place.dtype, device=ranks.device) for _ in range(count)]
            for shard in shards:
                dist.recv(shard, src=place.holder)
        return shards if ranks.is_main else None
