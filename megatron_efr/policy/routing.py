"""Routing replay: the policy's routers choose the experts that the engine chose at sampling, for
every token and layer.

An expert whose score is a rounding error ahead in one implementation is a rounding error behind in
the other, and then the two models compute different things. Ma et al. 2025 (arXiv 2510.11370, R3)
take the engine's choice in all of the policy's passes over a response: log-probs before the update,
the forward pass, its recomputation in the backward pass. The weights of the chosen experts are
still the policy's own router's, so gradients flow through it as ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

from megatron_efr.policy.model import PolicyModel
from megatron_efr.policy.ranks import Ranks
from megatron_efr.samples import PackedBatch, Sample
from megatron_efr.types import ByIndex, UserError
from megatron_efr.weights.architecture import Architecture


def lay_out_routing(
    batch: PackedBatch, samples: ByIndex[Sample], architecture: Architecture
) -> torch.Tensor:
    """The micro-batch's `routed_experts` [T, layers, experts per token], in the order of its
    tokens.

    The engine read no sequence's last token, and no padding: these go to the first experts. Nothing
    depends on them, since no other token sees them and they predict nothing. UserError if a
    sequence has no routing, or another model's.
    """
    assert architecture.experts is not None
    per_token, count = architecture.experts.per_token, architecture.experts.count
    kind = np.min_scalar_type(-count)  # signed, as torch has them in every width
    routed = np.empty((sum(batch.lengths), architecture.layers, per_token), kind)
    routed[:] = np.arange(per_token)
    starts = np.concatenate([[0], np.cumsum(batch.lengths)])
    for i, start in zip(batch.indices, starts, strict=False):
        chosen = samples[i].routed_experts
        _check_routing(chosen, (samples[i].length - 1, architecture.layers, per_token), count)
        routed[start : start + samples[i].length - 1] = chosen
    return torch.from_numpy(routed)


def _check_routing(chosen: np.ndarray | None, shape: tuple[int, int, int], count: int) -> None:
    if chosen is None:
        raise UserError(
            "model.routing: replay needs the experts that the engine chose, and a response came "
            "without; an SGLang server returns them when started with "
            "--enable-return-routed-experts. Or set model.routing to own"
        )
    if chosen.shape != shape:
        raise UserError(
            f"model.routing: the engine's routing is {list(chosen.shape)}, and the policy's model "
            f"has {list(shape)} (tokens, layers, experts per token); do both run the same model?"
        )
    if chosen.size and not 0 <= int(chosen.min()) <= int(chosen.max()) < count:
        raise UserError(
            f"model.routing: the engine chose experts {int(chosen.min())} to {int(chosen.max())}, "
            f"and the policy's model has 0 to {count - 1}; do both run the same model?"
        )


class OrderedChoice(RouterReplay):
    """Megatron's replay of a router, in which a token's experts stand by number, whoever chose
    them.

    Their order decides how their softmax is rounded. Megatron-Core sorts by weight (since 0.18 only
    in passes with gradients), an engine as it likes. In one order the same experts give the same
    bits: in the log-probs before an update and in the update itself, chosen or replayed.
    """

    def get_replay_topk(
        self, scores: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The chosen experts' scores and numbers, both [tokens, experts per token]; `scores`
        [tokens, experts].
        """
        _, chosen = super().get_replay_topk(scores, *args, **kwargs)
        chosen, _ = chosen.sort(dim=1)
        return scores.gather(1, chosen), chosen


class RoutingReplay:
    """The routers of this rank's chunks, told what to choose for the micro-batch at hand."""

    def __init__(
        self, config: TransformerConfig, chunks: Sequence[PolicyModel], ranks: Ranks
    ) -> None:
        self._ranks = ranks
        self._slices = ranks.tensor_ranks if config.sequence_parallel else 1
        selected = config.recompute_granularity == "selective" and "moe" in (
            config.recompute_modules or []
        )
        self._recomputes = config.recompute_granularity == "full" or selected
        self._routers = {chunk: _take_charge(chunk) for chunk in chunks}
        # Megatron's list of all routers ever made would keep dead models alive
        RouterReplay.clear_global_router_replay_instances()

    @contextmanager
    def replayed(self, chunk: PolicyModel, batch: PackedBatch) -> Iterator[None]:
        """Within it the chunk's routers choose the `routed_experts` of this context rank's part of
        a micro-batch.

        If the backward pass runs routers again, they then choose the same: each keeps its
        micro-batches in a queue, and in every pipeline schedule a chunk's micro-batches come back
        in the order they went.
        """
        if batch.routed_experts is None:
            yield
            return
        routed = batch.routed_experts.chunk(self._slices)[
            self._ranks.tensor_rank if self._slices > 1 else 0
        ]
        routed = routed.to(batch.tokens.device, torch.int64)
        for layer, router in self._routers[chunk].items():
            router.set_target_indices(routed[:, layer])
            router.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        try:
            yield
        finally:
            for router in self._routers[chunk].values():
                if self._recomputes and torch.is_grad_enabled():
                    router.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
                else:
                    router.clear_indices()

    @contextmanager
    def forgotten_at_the_end(self) -> Iterator[None]:
        """Round one pass over micro-batches: afterwards the routers choose for themselves, and hold
        no routing.
        """
        try:
            yield
        finally:
            for routers in self._routers.values():
                for router in routers.values():
                    router.clear_indices()
                    router.clear_router_replay_action()


def _take_charge(chunk: PolicyModel) -> dict[int, OrderedChoice]:
    """Give every router of a chunk an `OrderedChoice`; these by layer, counted from 0 in the whole
    model.
    """
    taken = {}
    for layer in cast(Any, chunk.decoder).layers:
        if (router := getattr(layer.mlp, "router", None)) is not None:
            router.router_replay = taken[layer.layer_number - 1] = OrderedChoice()
    return taken
