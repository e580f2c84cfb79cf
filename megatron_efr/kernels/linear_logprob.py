"""The log-prob head in plain torch: chunked over tokens, tensor parallel, with its own backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

CHUNK_TOKENS = 2048  # fp32 logits held at once: [2048, V / TP], 1.2 GB at V = 152k


class _Head(NamedTuple):
    """What a chunk's logits depend on besides hidden and weight."""

    temperature: float
    first: int  # vocabulary id of this rank's first row
    columns: int  # this rank's rows that lie in the true vocabulary; the rest is padding
    group: dist.ProcessGroup | None
    chunk: int


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    true_vocab: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    entropy: bool = False,
    chunk: int = CHUNK_TOKENS,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log softmax(hidden @ weight.T / temperature)[target] and, if asked for, the entropy of that distribution.

    `hidden` [T, H], `weight` [V_local, H] (this tensor-parallel rank's rows of the head), `targets` int64 [T], each in
    [0, true_vocab). Columns from `true_vocab` on are padding and get no probability. Returns fp32 [T] and fp32 [T] or
    None; differentiable in hidden and weight through both. At most [chunk, V_local] logits exist at a time; the
    backward pass makes them again. The gradient of `hidden` comes back summed over `tp_group`. IndexError for a target
    outside the vocabulary.
    """
    ranks = 1 if tp_group is None else dist.get_world_size(tp_group)
    first = 0 if tp_group is None else dist.get_rank(tp_group) * weight.shape[0]
    vocabulary = weight.shape[0] * ranks if true_vocab is None else true_vocab
    if targets.numel() and not (0 <= int(targets.min()) and int(targets.max()) < vocabulary):
        raise IndexError(f"targets span [{int(targets.min())}, {int(targets.max())}], the vocabulary is {vocabulary}")
    columns = min(max(vocabulary - first, 0), weight.shape[0])
    head = _Head(temperature, first, columns, tp_group if ranks > 1 else None, chunk)
    logprob, entropies = _LinearLogprob.apply(hidden, weight, targets, head, entropy)
    return logprob, entropies if entropy else None


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, head: _Head, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = hidden.shape[0]
        logprob = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
        lse = torch.empty_like(logprob)
        entropies = torch.empty_like(logprob) if entropy else logprob.new_empty(0)
        for rows in _chunks(tokens, head.chunk):
            logits = _logits(hidden[rows], weight, head)
            lse[rows], mean = _log_sum_exp(logits, head, entropy)
            logprob[rows] = _target_logit(logits, targets[rows], head) - lse[rows]
            if mean is not None:
                entropies[rows] = lse[rows] - mean
        ctx.head, ctx.entropy = head, entropy
        ctx.save_for_backward(hidden, weight, targets, lse, entropies)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logprob, entropies

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, lse, entropies = ctx.saved_tensors
        head: _Head = ctx.head
        grad_logprob, grad_entropy = grads
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        # accumulated over chunks in fp32: in bf16 the error would grow with the number of chunks
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for rows in _chunks(hidden.shape[0], head.chunk) if head.columns else []:
            logits = _logits(hidden[rows], weight, head)
            log_probs = logits - lse[rows, None]
            probs = log_probs.exp()
            # d logprob = onehot - p; d entropy = -p * (log p + entropy)
            d_logits = -grad_logprob[rows, None] * probs
            if ctx.entropy:
                weighted = torch.where(probs > 0, probs * (log_probs + entropies[rows, None]), 0.0)
                d_logits -= grad_entropy[rows, None] * weighted
            local, owned = _local_targets(targets[rows], head)
            d_logits.scatter_add_(1, local[:, None], torch.where(owned, grad_logprob[rows], 0.0)[:, None])
            d_logits = (d_logits / head.temperature).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = (d_logits @ weight[: head.columns]).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight[: head.columns] += d_logits.t() @ hidden[rows].to(weight.dtype)
        if grad_hidden is not None and head.group is not None:
            dist.all_reduce(grad_hidden, group=head.group)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _chunks(tokens: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]


def _logits(hidden: torch.Tensor, weight: torch.Tensor, head: _Head) -> torch.Tensor:
    """fp32 logits [rows, columns] of this rank's true vocabulary."""
    return (hidden.to(weight.dtype) @ weight[: head.columns].t()).float() / head.temperature


def _log_sum_exp(logits: torch.Tensor, head: _Head, entropy: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log sum exp over the whole vocabulary [rows], and the mean logit under the softmax when entropy needs it."""
    if logits.shape[1]:
        peak = logits.max(dim=1).values
    else:  # this rank holds nothing but padding
        peak = logits.new_full((logits.shape[0],), -torch.inf)
    if head.group is not None:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=head.group)
    exp = (logits - peak[:, None]).exp()
    sums = torch.stack([exp.sum(1), (exp * logits).sum(1)]) if entropy else exp.sum(1)[None]
    if head.group is not None:
        dist.all_reduce(sums, group=head.group)
    return peak + sums[0].log(), sums[1] / sums[0] if entropy else None


def _local_targets(targets: torch.Tensor, head: _Head) -> tuple[torch.Tensor, torch.Tensor]:
    """Each target's column on this rank, clamped into range, and whether this rank owns it."""
    local = targets - head.first
    owned = (local >= 0) & (local < head.columns)
    return local.clamp(0, max(head.columns - 1, 0)), owned


def _target_logit(logits: torch.Tensor, targets: torch.Tensor, head: _Head) -> torch.Tensor:
    if not head.columns:
        value = logits.new_zeros(logits.shape[0])
    else:
        local, owned = _local_targets(targets, head)
        value = torch.where(owned, logits.gather(1, local[:, None])[:, 0], 0.0)
    if head.group is not None:
        dist.all_reduce(value, group=head.group)
    return value
