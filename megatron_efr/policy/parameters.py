"""The policy's parameters by their names in the whole model: loaded, exchanged, handed out
whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model

from megatron_efr.policy.lora import Merged, switched_off
from megatron_efr.policy.model import PolicyModel, canonical_parameters
from megatron_efr.policy.ranks import Ranks
from megatron_efr.publication.bucket_plan import BUCKET_BYTES, BucketPlan
from megatron_efr.publication.reshard import Parcel, Reshard
from megatron_efr.weights.folder import TensorSource
from megatron_efr.weights.mapping import WeightMapping

Kind = Literal["weights", "gradients"]


class Parameters:
    """This rank's parameters by canonical name (`WeightMapping.parameters`), layers and experts
    counted globally.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        mapping: WeightMapping,
        ranks: Ranks,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._chunks = chunks
        self._mapping = mapping
        self._ranks = ranks
        self._bucket_bytes = bucket_bytes
        models = [cast(PolicyModel, unwrap_model(chunk)) for chunk in chunks]
        self._local = [
            pair for model in models for pair in canonical_parameters(model, mapping).items()
        ]
        self._adapters = [model.adapters for model in models if model.adapters is not None]
        self._reshards: dict[Kind, Reshard] = {}

    @property
    def adapted(self) -> bool:
        """True if adapters are trained, and no weight is."""
        return bool(self._adapters)

    @torch.no_grad()
    def load(self, source: TensorSource) -> None:
        """Copy this rank's shards from whole Hugging Face tensors, read one parameter at a time."""
        for name, parameter in self._local:
            tensors = {hf: source[hf] for hf in self._mapping.sources(name)}
            parameter.copy_(self._mapping.to_megatron(name, tensors, self._ranks.tensor_rank))

    def draw_adapters(self, seed: int) -> None:
        """Give every adapter its first values, which change nothing: B is zero."""
        for adapters in self._adapters:
            for adapter in adapters.by_weight().values():
                adapter.draw(seed)

    def adapters_off(self) -> AbstractContextManager[None]:
        """Within it the model is the one that training began with, if adapters are all that is
        trained.
        """
        return switched_off(self._adapters)

    def finish_gather(self) -> None:
        """Wait until every weight is whole.

        Under `overlap_param_gather` an updated weight comes from the other replicas when a forward
        pass calls the module that holds it; who reads weights in another way calls this first. All
        replicas together.
        """
        for chunk in cast(Sequence[DistributedDataParallel], self._chunks):
            if chunk.use_forward_hook:
                for group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
                    group.finish_param_sync(skip_next_bucket_dispatch=True)

    def copies(self) -> list[torch.Tensor]:
        """A copy of every local parameter, in its shape and type, in host memory."""
        self.finish_gather()
        return [parameter.detach().to("cpu", copy=True) for _, parameter in self._local]

    @torch.no_grad()
    def exchange(self, values: list[torch.Tensor]) -> list[torch.Tensor]:
        """Put `values` (as `copies` gave them) into the parameters; returns what stood there, in
        host memory.
        """
        self.finish_gather()
        before = []
        for (_, parameter), value in zip(self._local, values, strict=True):
            before.append(parameter.detach().to("cpu", copy=True))
            parameter.copy_(value)
        return before

    def parcels(
        self, of: Kind = "weights", *, flat: bool = False, everywhere: bool = False
    ) -> Iterator[Parcel]:
        """Whole tensors by Hugging Face name, a bucket at a time, on rank 0 or `everywhere`: see
        `Reshard.parcels`.

        All ranks iterate together. Gradients are what the last backward pass left, after clipping
        if that is on. Weights have the adapters' added, one at a time.
        """
        # the last update's shards may still be on their way to the replicas
        self.finish_gather()
        local = {
            name: parameter.detach()
            if of == "weights"
            else cast(torch.Tensor, cast(Any, parameter).main_grad)
            for name, parameter in self._local
        }
        if of not in self._reshards:  # gradients may be wider than weights
            ranks = self._ranks
            group = ranks.replica_group
            members = dist.get_process_group_ranks(group)
            plan = BucketPlan.agreed(
                local,
                self._mapping,
                ranks.tensor_rank,
                members,
                ranks.cpu_world,
                self._bucket_bytes,
            )
            self._reshards[of] = Reshard(plan, self._mapping, group)
        # merged weight by weight as they pass: no second model stands beside this one
        by_weight = {
            weight: each
            for adapters in self._adapters
            for weight, each in adapters.by_weight().items()
        }
        shards = Merged(local, by_weight) if by_weight else local
        return self._reshards[of].parcels(shards, flat=flat, everywhere=everywhere)

    def adapter_tensors(self, of: Kind = "weights") -> dict[str, torch.Tensor]:
        """Whole adapter tensors by PEFT's names, in host memory, on rank 0; none elsewhere. All
        ranks together.
        """
        self.finish_gather()
        mine = {}
        if 0 in dist.get_process_group_ranks(self._ranks.replica_group):
            each = (
                shard
                for adapters in self._adapters
                for one in adapters.by_weight().values()
                for shard in one.shards()
            )
            for name, (tensor, split) in each:
                held = tensor.detach() if of == "weights" else cast(Any, tensor).main_grad
                mine[name, self._ranks.tensor_rank if split is not None else 0] = (
                    held.to("cpu", copy=True),
                    split,
                )
        everyone: list[Any] = [None] * self._ranks.world_size
        dist.gather_object(
            mine, everyone if self._ranks.is_main else None, group=self._ranks.cpu_world
        )
        shards = {place: shard for held in everyone if held for place, shard in held.items()}
        whole: dict[str, torch.Tensor] = {}
        for (name, _), (tensor, split) in sorted(shards.items(), key=lambda item: item[0]):
            whole[name] = torch.cat([whole[name], tensor], dim=split) if name in whole else tensor
        return whole
