"""The last stage's head: from hidden states to log-probs, or straight to the policy loss and its
gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig

from megatron_efr.algorithms.objective import Objective
from megatron_efr.kernels import (
    Backend,
    PolicyRows,
    default_chunk,
    fused_policy_loss,
    linear_logprob,
)
from megatron_efr.policy.model import PolicyModel
from megatron_efr.policy.ranks import Ranks
from megatron_efr.samples import PackedBatch


@dataclass(frozen=True, slots=True)
class Head:
    """The head: makes log-probs from this rank's rows of the output layer; on the last stage.

    `weight` is [V / TP, hidden].

    `chunk` is how many tokens' logits exist at a time; `tensor_group` and `context_group`, whose
    ranks hold a sequence together, are None without that parallelism.
    """

    weight: torch.nn.Parameter
    vocab: int
    temperature: float
    tensor_group: dist.ProcessGroup | None
    sequence_parallel: bool
    chunk: int
    backend: Backend
    context_group: dist.ProcessGroup | None = None

    def rows(self, hidden: torch.Tensor, batch: PackedBatch, factor: float) -> HeadRows:
        """The micro-batch's response rows, from the last layer's hidden states [tokens, 1,
        hidden].
        """
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
        """Megatron's gradient of the weight, if it is fp32; else None, and the gradient goes
        through autograd.
        """
        main_grad = getattr(self.weight, "main_grad", None)
        return main_grad if main_grad is not None and main_grad.dtype == torch.float32 else None


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Arguments of a loss: the batch, and its rows before the head, `states` [R, hidden].

    A loss takes one of the two ways. `factor` is what the loss will have been scaled by when its
    backward pass begins.
    """

    head: Head
    states: torch.Tensor
    batch: PackedBatch
    factor: float

    def logprobs(self, live: int | None = None) -> torch.Tensor:
        """fp32 [R], for any loss: the backward pass computes the logits again, of the first `live`
        rows.

        The others have no gradient, as the loss knows (`batch.live_rows`, if it is a multiple of
        the advantage).
        """
        head, batch = self.head, self.batch
        return linear_logprob(self.states, head.weight, batch.targets, live=live, **head.options)[0]

    def logprobs_and_entropies(self, live: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Like `logprobs`, with the entropy of each row's distribution, fp32 [R]."""
        head, batch = self.head, self.batch
        logprobs, entropies = linear_logprob(
            self.states, head.weight, batch.targets, entropy=True, live=live, **head.options
        )
        assert entropies is not None
        return logprobs, entropies

    def given(self, objective: Objective) -> PolicyRows:
        """Columns that the loss reads beside log-probs, as the kernels take them."""
        columns = self.batch.columns
        old = columns["old_logprob"]
        behaviour = columns.get("behaviour_logprob")
        return PolicyRows(
            old=old if behaviour is None else behaviour,
            advantages=columns["advantage"],
            weights=columns["weight"],
            reference=None if objective.loss_kl == "none" else columns.get("reference_logprob"),
            importance=columns.get("importance"),
            before=None if behaviour is None else old,
        )

    def policy_loss(self, objective: Objective) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Scalar loss of `Objective`, and figures, by tokens' log-probs alone: logits exist once.

        The weight's gradient goes into its `main_grad` in this pass, for the factor promised, if
        that is fp32.
        """
        head, batch = self.head, self.batch
        loss, _, figures = fused_policy_loss(
            self.states, head.weight, batch.targets, self.given(objective), objective,
            factor=self.factor,
            main_grad=head.main_grad, live=batch.live_rows, **head.options,
        )  # fmt: skip
        if loss.requires_grad and head.main_grad is not None:
            loss = _GradientIsThere.apply(loss, head.weight)
        return loss, figures


def build_head(
    model: PolicyModel,
    vocab: int,
    chunk_tokens: int | None,
    ranks: Ranks,
    temperature: float,
    backend: Backend,
) -> Head | None:
    """The head of this rank's last chunk, on the last stage; None elsewhere."""
    if not ranks.is_last_stage:
        return None
    weight = model.head_weight
    return Head(
        weight=weight,
        vocab=vocab,
        temperature=temperature,
        tensor_group=ranks.tensor_group if ranks.tensor_ranks > 1 else None,
        sequence_parallel=model.config.sequence_parallel,
        chunk=chunk_tokens or default_chunk(weight.shape[0], ranks.tensor_ranks, weight.device),
        backend=backend,
        context_group=ranks.context_group if ranks.context_ranks > 1 else None,
    )


def loss_scaling(
    config: TransformerConfig, ranks: Ranks, micro_batches: int
) -> tuple[float, float]:
    """Factor that undoes Megatron's averaging of our losses, and that of the backward pass.

    Without `calculate_per_token_loss` the schedule divides a loss by the number of micro-batches,
    and DDP the gradients by that of its ranks. The loss scale comes last.
    """
    assert config.grad_scale_func is not None
    scale = float(config.grad_scale_func(torch.ones((), device=ranks.device)))
    if config.calculate_per_token_loss:
        return 1.0, scale
    averaged = ranks.replicas * ranks.context_ranks
    return float(micro_batches * averaged), averaged * scale


class _GradientIsThere(torch.autograd.Function):
    """Tells Megatron's DDP in the backward pass that `main_grad` has the weight's gradient.

    As `tensor_parallel.layers` does it: a flag on the weight, and a gradient without meaning that
    sets off the hook which reduces. If the embedding is tied on the same stage (`zero_out_wgrad`),
    its gradient is added to ours before the hook adds the sum to `main_grad`, so ours is zeros.
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
