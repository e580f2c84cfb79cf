"""The policy's parameters by their names in the whole model: loaded, exchanged, handed out whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model

from megatron_efr.policy.model import PolicyModel
from megatron_efr.policy.ranks import Ranks
from megatron_efr.publication.plan import BUCKET_BYTES, Plan
from megatron_efr.publication.reshard import Parcel, Reshard
from megatron_efr.weights.folder import TensorSource
from megatron_efr.weights.mapping import WeightMapping

Kind = Literal["weights", "gradients"]


class Parameters:
    """This rank's parameters by canonical name (`WeightMapping.parameters`), layers and experts counted globally."""

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
        self._local = [pair for chunk in chunks for pair in self._named(cast(PolicyModel, unwrap_model(chunk)))]
        self._reshards: dict[Kind, Reshard] = {}

    def _named(self, model: PolicyModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                layer: Any = model.decoder.layers[int(parts[2])]
                parts[2] = str(layer.layer_number - 1)
            yield self._mapping.canonical(".".join(parts)), parameter

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
        """A copy of every local parameter, in its shape and type, in host memory."""
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

    def parcels(self, of: Kind = "weights", *, flat: bool = False, everywhere: bool = False) -> Iterator[Parcel]:
        """Whole tensors by Hugging Face name, a bucket at a time, on rank 0 or `everywhere`: see `Reshard.parcels`.

        All ranks iterate together. Gradients are what the last backward pass left, after clipping
        if that is on.
        """
        self.finish_gather()
        local = {
            name: parameter.detach() if of == "weights" else cast(torch.Tensor, cast(Any, parameter).main_grad)
            for name, parameter in self._local
        }
        if of not in self._reshards:  # gradients may be wider than weights
            ranks = self._ranks
            group = ranks.replica_group
            members = dist.get_process_group_ranks(group)
            plan = Plan.agreed(local, self._mapping, ranks.tensor_rank, members, ranks.cpu_world, self._bucket_bytes)
            self._reshards[of] = Reshard(plan, self._mapping, group)
        return self._reshards[of].parcels(local, flat=flat, everywhere=everywhere)
