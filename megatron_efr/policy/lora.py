"""Low-rank adapters beside Megatron's linear layers (Hu et al. 2021): each adds (alpha / rank) B A
x to what W x gives.

Megatron joins projections (q, k and v; gate and up), and splits them over tensor-parallel ranks. An
adapter belongs to one projection nonetheless, as PEFT has it: `Adapter` holds the A and B of all
that one linear layer joins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from megatron_efr.config import ConfigError, LoraConfig
from megatron_efr.weights.lora import ALPHA, drawn, merge, tensor_names
from megatron_efr.weights.mapping import WeightMapping

Linear = ColumnParallelLinear | RowParallelLinear


class Shard(NamedTuple):
    """This rank's part of an adapter's tensor, and the dimension that tensor-parallel ranks split;
    None: none.
    """

    tensor: torch.nn.Parameter
    split: int | None


class Adapter(torch.nn.Module):
    """The adapters of one linear layer on this tensor-parallel rank.

    Of each targeted projection `a` [rank, in] and `b` [out, rank]. A layer split by rows
    (`ColumnParallelLinear`) splits B alike and has A whole; one split by columns
    (`RowParallelLinear`) splits A and has B whole. Only the [tokens, rank] between the two travels
    between ranks. Under sequence parallelism each rank sees a part of the tokens on the whole one's
    side, and Megatron adds up its gradients as it does a norm's.
    """

    def __init__(
        self, linear: Linear, projections: Mapping[str, int], groups: int, config: LoraConfig
    ) -> None:
        """`projections`: what the layer joins, by the module's name in Hugging Face's model, and
        their whole rows.

        Its rows on this rank are `groups` in a row, each with its share of every projection.
        """
        super().__init__()
        self.scaling, self.rank = config.scaling, config.rank
        self.by_rows = isinstance(linear, ColumnParallelLinear)
        self.sequence_parallel = linear.sequence_parallel
        self._group, self._groups = linear.tp_group, groups
        ranks = cast(Any, linear.tp_group).size()
        self._rows = {
            name: rows // ranks if self.by_rows else rows for name, rows in projections.items()
        }
        self.names = [name for name in projections if name.rpartition(".")[2] in config.targets]
        weight = cast(torch.nn.Parameter, linear.weight)
        # the module's own, in no ParameterList: overlap_param_gather gathers the parameters of
        # modules that are called, and a list is not
        for i, name in enumerate(self.names):
            a = weight.new_empty(config.rank, weight.shape[1])
            b = weight.new_zeros(self._rows[name], config.rank)
            self.register_parameter(f"a{i}", torch.nn.Parameter(a))
            self.register_parameter(f"b{i}", torch.nn.Parameter(b))
        split, whole, dim = (self.b, self.a, 0) if self.by_rows else (self.a, self.b, 1)
        for parameter in split:
            set_tensor_model_parallel_attributes(parameter, True, dim, 1)
        for parameter in whole:
            cast(Any, parameter).sequence_parallel = linear.sequence_parallel

    @property
    def a(self) -> tuple[torch.nn.Parameter, ...]:
        """A of each of `names`."""
        return tuple(self.get_parameter(f"a{i}") for i in range(len(self.names)))

    @property
    def b(self) -> tuple[torch.nn.Parameter, ...]:
        """B of each of `names`."""
        return tuple(self.get_parameter(f"b{i}") for i in range(len(self.names)))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The layer's result `y`, from input `x`, with the adapters' added."""
        # of two dimensions: of three torch may choose another product if a gradient is wanted, and
        # the pass that trains would differ from the one that scores
        low = self._across(F.linear(x.flatten(0, -2), torch.cat(self.a)))
        flat = torch.addmm(y.flatten(0, -2), low, self._joined_b().t(), alpha=self.scaling)
        return flat.view_as(y)

    def _across(self, low: torch.Tensor) -> torch.Tensor:
        """[tokens, rank] as the other side wants it: every token's, and summed over the ranks that
        split the input.
        """
        if self.by_rows:
            gather, copy = (
                gather_from_sequence_parallel_region,
                copy_to_tensor_model_parallel_region,
            )
            return (gather if self.sequence_parallel else copy)(low, group=self._group)
        scatter, reduce = (
            reduce_scatter_to_sequence_parallel_region,
            reduce_from_tensor_model_parallel_region,
        )
        return (scatter if self.sequence_parallel else reduce)(low, group=self._group)

    def _joined_b(self) -> torch.Tensor:
        """The Bs in the layer's order of rows, each in columns of its own; zeros for what has no
        adapter.
        """
        each = dict(zip(self.names, self.b, strict=True))
        width, parts = len(each) * self.rank, []
        for name, rows in self._rows.items():
            if name in each:
                before = self.names.index(name) * self.rank
                part = F.pad(each[name], (before, width - before - self.rank))
            else:
                part = self.b[0].new_zeros(rows, width)
            parts.append(part.view(self._groups, -1, width))
        return torch.cat(parts, dim=1).flatten(0, 1)

    @torch.no_grad()
    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """This rank's shard of the layer's weight with the adapters' added, computed in float32."""
        return merge(weight, torch.cat(self.a), self._joined_b(), self.scaling)

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """Begin: A as PEFT draws it, a function of seed and name, so the same in any layout; B
        zero.
        """
        ranks, rank = cast(Any, self._group).size(), cast(Any, self._group).rank()
        for name, a, b in zip(self.names, self.a, self.b, strict=True):
            columns = a.shape[1] * (1 if self.by_rows else ranks)
            whole = drawn(seed, tensor_names(name)[0], (self.rank, columns))
            a.copy_(whole if self.by_rows else whole.chunk(ranks, dim=1)[rank])
            b.zero_()

    def shards(self) -> Iterator[tuple[str, Shard]]:
        """(name, shard) of each A and B."""
        split_a, split_b = (None, 0) if self.by_rows else (1, None)
        for name, a, b in zip(self.names, self.a, self.b, strict=True):
            name_a, name_b = tensor_names(name)
            yield name_a, Shard(a, split_a)
            yield name_b, Shard(b, split_b)


class Adapters(torch.nn.Module):
    """The adapters of one model chunk, by the canonical name of the weight that they are beside."""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        super().__init__()
        self.each = torch.nn.ModuleList(adapters.values())
        self.weights = list(adapters)
        self.on = True

    def by_weight(self) -> dict[str, Adapter]:
        """Every adapter, by the weight that it is beside."""
        return dict(zip(self.weights, cast(Any, self.each), strict=True))

    def shards(self) -> Iterator[tuple[str, Shard]]:
        """(name, shard) of each adapter's A and B."""
        return (pair for adapter in self.by_weight().values() for pair in adapter.shards())

    def sharded_state_dict(self, prefix: str = "", *_: Any, **__: Any) -> dict[str, ShardedTensor]:
        """The adapters for a checkpoint: each tensor under its own name in the whole model,
        whichever rank holds it.
        """
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        rank = parallel_state.get_tensor_model_parallel_rank()
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        held = {id(parameter): prefix + name for name, parameter in self.named_parameters()}
        state = {}
        for name, (tensor, split) in self.shards():
            offsets = [] if split is None else [(split, rank, ranks)]
            copy = (0, rank if split is None else 0, replica)
            state[held[id(tensor)]] = ShardedTensor.from_rank_offsets(
                name, tensor, *offsets, replica_id=copy
            )
        return state


def adapt(
    model: torch.nn.Module,
    linears: Mapping[str, Linear],
    mapping: WeightMapping,
    config: LoraConfig,
) -> None:
    """Freeze the model, and give it adapters beside those of `linears` (by their weights' canonical
    names) that are targets. They stand apart in `model.lora`, so that nothing else finds other
    names, tensors or layers than it knows.

    ConfigError if a layer has no linear layer for a target.
    """
    model.requires_grad_(False)
    made: dict[str, Adapter] = {}
    shapes = mapping.shapes()
    for weight, linear in linears.items():
        sources = {
            name.removesuffix(".weight"): shapes[name][0] for name in mapping.sources(weight)
        }
        if any(name.rpartition(".")[2] in config.targets for name in sources):
            groups = (
                mapping.architecture.kv_heads // mapping.tensor_ranks
                if mapping.split(weight) == "qkv"
                else 1
            )
            made[weight] = Adapter(linear, sources, groups, config)
    _check_targets(model, made, config)
    adapters = Adapters(made)
    cast(Any, model).lora = adapters
    for weight, adapter in made.items():
        linears[weight].register_forward_hook(_adding(adapters, adapter))


def _check_targets(model: torch.nn.Module, made: Mapping[str, Adapter], config: LoraConfig) -> None:
    """Refuse a target that got no adapter in some layer: it would stay untrained, silently."""
    found = Counter(name.rpartition(".")[2] for each in made.values() for name in each.names)
    layers = len(cast(Any, model).decoder.layers)
    missing = [target for target in config.targets if found[target] != layers]
    if missing:
        raise ConfigError(
            f"model.lora.targets: of a stage's {layers} layers some have no linear layer of "
            f"Megatron's for {', '.join(missing)}; leave it out, or set model.megatron so that "
            "every layer has one"
        )


def _adding(adapters: Adapters, adapter: Adapter) -> Any:
    """A hook that adds an adapter's part to a linear layer's result, if adapters are on."""

    def add(_: torch.nn.Module, given: tuple[Any, ...], result: tuple[torch.Tensor, Any]) -> Any:
        return (adapter(given[0], result[0]), result[1]) if adapters.on else result

    return add


def alpha_state(config: LoraConfig | None, rank: int) -> dict[str, ShardedTensor]:
    """The number that a checkpoint keeps beside adapters, so that it can be merged without its
    configuration.
    """
    if config is None:
        return {}
    alpha = torch.tensor([config.alpha], dtype=torch.float64)
    return {ALPHA: ShardedTensor.from_rank_offsets(ALPHA, alpha, replica_id=(0, 0, rank))}


class Merged(Mapping[str, torch.Tensor]):
    """Shards of weights with the adapters' added, each computed when it is asked for."""

    def __init__(self, shards: Mapping[str, torch.Tensor], adapters: Mapping[str, Adapter]) -> None:
        self._shards, self._adapters = shards, adapters

    def __getitem__(self, name: str) -> torch.Tensor:
        adapter = self._adapters.get(name)
        return self._shards[name] if adapter is None else adapter.merged(self._shards[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)


@contextmanager
def switched_off(every: list[Adapters]) -> Iterator[None]:
    """Within it the model is the one that training began with."""
    for adapters in every:
        adapters.on = False
    try:
        yield
    finally:
        for adapters in every:
            adapters.on = True
