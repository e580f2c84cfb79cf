"""The last stage's head: from hidden states to log-probs, or straight to the policy loss and its gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig

from megatron_efr.config import ModelConfig
from megatron_efr.kernels import (
    CHUNK_TOKENS,
    Backend,
    PolicyRows,
    PolicyTerms,
    choose_backend,
    fused_policy_loss,
    linear_logprob,
)
from megatron_efr.policy.model import PolicyModel
from megatron_efr.policy.ranks import Ranks
from megatron_efr.types import PackedBatch
from megatron_efr.weights.architecture import Architecture


@dataclass(frozen=True, slots=True)
class Head:
    """How this rank's rows of the output layer, `weight` [V / TP, hidden], become log-probs. The last stage has one.

    `chunk` is how many tokens' logits exist at a time; `tensor_group` is None without tensor parallelism.
    """

    weight: torch.nn.Parameter
    vocab: int
    temperature: float
    tensor_group: dist.ProcessGroup | None
    sequence_parallel: bool
    chunk: int
    backend: Backend

    def rows(self, hidden: torch.Tensor, batch: PackedBatch, factor: float) -> HeadRows:
        """The micro-batch's response rows, from the last layer's hidden states [tokens, 1, hidden]."""
        if self.sequence_parallel:  # its backward pass sums over tensor ranks, and scatters
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tensor_group)
        return HeadRows(self, hidden[:, 0].index_select(0, batch.rows), batch, factor)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that both of the kernels take."""
        return {
            "temperature": self.temperature,
            "true_vocab": self.vocab,
            "tp_group": self.tensor_group,
            "sum_hidden": not self.sequence_parallel,
            "chunk": self.chunk,
            "backend": self.backend,
        }

    @property
    def main_grad(self) -> torch.Tensor | None:
        """Megatron's gradient of the weight, where it is fp32; else None, and the gradient goes through autograd."""
        main_grad = getattr(self.weight, "main_grad", None)
        return main_grad if main_grad is not None and main_grad.dtype == torch.float32 else None


@dataclass(frozen=True, slots=True)
class HeadRows:
    """What a loss is computed from: one micro-batch's rows before the head, `states` [R, hidden], and the batch.

    A loss takes one of the two ways. `factor` is what the loss will have been scaled by when its backward pass begins.
    """

    head: Head
    states: torch.Tensor
    batch: PackedBatch
    factor: float

    def logprobs(self, live: int | None = None) -> torch.Tensor:
        """fp32 [R], for any loss: the backward pass computes the logits again, of the first `live` rows.

        The others have no gradient, as the loss knows (`batch.live_rows`, where it is a multiple of the advantage).
        """
        head, batch = self.head, self.batch
        return linear_logprob(self.states, head.weight, batch.targets, live=live, **head.options)[0]

    def policy_loss(self, terms: PolicyTerms) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of `PolicyTerms` and its figures, for what each token's log-prob gives alone: logits exist once.

        The weight's gradient goes into its `main_grad` in this pass, for the factor promised, where that is fp32.
        """
        head, batch = self.head, self.batch
        assert batch.old_logprobs is not None
        assert batch.advantages is not None
        # a weight >= 0 goes through the minimum and the clip, so that it may as well stand with the advantage
        advantages = batch.advantages if batch.importance is None else batch.advantages * batch.importance
        rows = PolicyRows(batch.old_logprobs, advantages, batch.weights, batch.reference_logprobs)
        loss, _, figures = fused_policy_loss(
            self.states, head.weight, batch.targets, rows, terms, factor=self.factor, main_grad=head.main_grad,
            live=batch.live_rows, **head.options,
        )  # fmt: skip
        if loss.requires_grad and head.main_grad is not None:
            loss = _GradientIsThere.apply(loss, head.weight)
        return loss, figures


def build_head(
    model: PolicyModel, config: ModelConfig, architecture: Architecture, ranks: Ranks, temperature: float
) -> Head | None:
    """The head of this rank's last chunk, on the last stage; rank 0 says which kernels run."""
    kernels, reason = choose_backend(config.kernels)
    if ranks.is_main:
        print(f"kernels: {kernels} ({reason})", flush=True)
    if not ranks.is_last_stage:
        return None
    return Head(
        weight=model.head_weight,
        vocab=architecture.vocab,
        temperature=temperature,
        tensor_group=ranks.tensor_group if ranks.tensor_ranks > 1 else None,
        sequence_parallel=model.config.sequence_parallel,
        chunk=config.head_chunk_tokens or CHUNK_TOKENS * ranks.tensor_ranks,
        backend=kernels,
    )


def loss_scaling(config: TransformerConfig, ranks: Ranks, micro_batches: int) -> tuple[float, float]:
    """What undoes Megatron's own averaging of our losses, and the factor that these arrive at backward with.

    Without `calculate_per_token_loss` the schedule divides a loss by the number of micro-batches, and DDP the
    gradients by that of its ranks. The loss scale comes last.
    """
    assert config.grad_scale_func is not None
    scale = float(config.grad_scale_func(torch.ones((), device=ranks.device)))
    if config.calculate_per_token_loss:
        return 1.0, scale
    averaged = ranks.replicas * ranks.context_ranks
    return float(micro_batches * averaged), averaged * scale


class _GradientIsThere(torch.autograd.Function):
    """Tells Megatron's DDP in the backward pass that `main_grad` has the weight's gradient.

    As `tensor_parallel.layers` does it: a flag on the weight, and a gradient without meaning that sets off the hook
    which reduces. Where the embedding is tied on the same stage (`zero_out_wgrad`), its gradient is added to ours
    before the hook adds the sum to `main_grad`, so ours is zeros.
    """

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight = ctx.weight
        weight.grad_added_to_main_grad = True
        tied = getattr(weight, "zero_out_wgrad", False)
        return grads[0], torch.zeros_like(weight) if tied else torch.empty_like(weight)
