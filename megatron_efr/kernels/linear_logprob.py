"""The log-prob head: chunked over tokens, tensor parallel, with its own backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_efr.kernels.backend import Backend, row_kernels
from megatron_efr.kernels.products import accumulate_weight_gradient, logits_into
from megatron_efr.kernels.rows import RowKernels, Softmax, chunks, live_spans, merge

CHUNK_TOKENS = 2048  # fp32 logits held at once: [2048, V / TP], 1.2 GB at V = 152k


class Head(NamedTuple):
    """What a chunk's log-probs depend on besides hidden, weight and targets."""

    kernels: RowKernels
    scale: float  # 1 / temperature
    columns: int  # this rank's rows of the weight that lie in the true vocabulary; the rest is padding
    group: dist.ProcessGroup | None  # None where there is nobody to merge with
    chunk: int

    def softmax(self, logits: torch.Tensor, local: torch.Tensor, entropy: bool) -> Softmax:
        """Over the whole vocabulary, from this rank's logits [rows, V_local]."""
        statistics = self.kernels.statistics(logits, local, self.columns, self.scale, entropy)
        return merge(statistics, local, entropy, self.group)


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
    backend: Backend = "torch",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log softmax(hidden @ weight.T / temperature)[target] and, if asked for, the entropy of that distribution.

    `hidden` [T, H], `weight` [V_local, H] (this tensor-parallel rank's rows of the head), `targets` int64 [T], each in
    [0, true_vocab). Columns from `true_vocab` on are padding and get no probability. Returns fp32 [T] and fp32 [T] or
    None; differentiable in hidden and weight through both. At most [chunk, V_local] logits exist at a time; the
    backward pass makes them again, and leaves out rows without a gradient. The gradient of `hidden` comes back summed
    over `tp_group`. IndexError for a target outside the vocabulary.
    """
    head, local = prepare(weight, targets, temperature, true_vocab, tp_group, chunk, backend)
    logprob, entropies = _LinearLogprob.apply(hidden, weight, local, head, entropy)
    return logprob, entropies if entropy else None


def prepare(
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    true_vocab: int | None,
    tp_group: dist.ProcessGroup | None,
    chunk: int,
    backend: Backend,
) -> tuple[Head, torch.Tensor]:
    """The head, and each target's column on this rank [T], -1 where another has it; IndexError as `linear_logprob`."""
    ranks = 1 if tp_group is None else dist.get_world_size(tp_group)
    first = 0 if tp_group is None else dist.get_rank(tp_group) * weight.shape[0]
    vocabulary = weight.shape[0] * ranks if true_vocab is None else true_vocab
    if targets.numel() and not (0 <= int(targets.min()) and int(targets.max()) < vocabulary):
        raise IndexError(f"targets span [{int(targets.min())}, {int(targets.max())}], the vocabulary is {vocabulary}")
    columns = min(max(vocabulary - first, 0), weight.shape[0])
    local = torch.where((targets >= first) & (targets < first + columns), targets - first, -1)
    group = tp_group if ranks > 1 else None
    return Head(row_kernels(backend), 1.0 / temperature, columns, group, chunk), local


def logits_buffer(rows: int, weight: torch.Tensor, chunk: int) -> torch.Tensor:
    """Room for one chunk's fp32 logits, used again by every chunk."""
    return torch.empty(min(rows, chunk), weight.shape[0], dtype=torch.float32, device=weight.device)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, local: torch.Tensor, head: Head, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = hidden.shape[0]
        logprob, peak, log_total = torch.empty(3, tokens, dtype=torch.float32, device=hidden.device)
        entropies = torch.empty_like(logprob) if entropy else logprob.new_empty(0)
        buffer = logits_buffer(tokens, weight, head.chunk)
        for rows in chunks(tokens, head.chunk):
            logits = logits_into(buffer[: rows.stop - rows.start], hidden[rows].to(weight.dtype), weight)
            softmax = head.softmax(logits, local[rows], entropy)
            logprob[rows], peak[rows], log_total[rows] = softmax.logprob, softmax.peak, softmax.log_total
            if softmax.entropy is not None:
                entropies[rows] = softmax.entropy
        ctx.head, ctx.entropy = head, entropy
        ctx.save_for_backward(hidden, weight, local, peak, log_total, logprob, entropies)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logprob, entropies

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, local, peak, log_total, logprob, entropies = ctx.saved_tensors
        head: Head = ctx.head
        grad_logprob = grads[0].contiguous()  # it may come expanded
        grad_entropy = grads[1].contiguous() if ctx.entropy else None
        live = grad_logprob != 0 if grad_entropy is None else (grad_logprob != 0) | (grad_entropy != 0)
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        # accumulated over chunks in fp32: in bf16 the error would grow with the number of chunks
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        buffer = logits_buffer(hidden.shape[0], weight, head.chunk)
        for rows in live_spans(live, head.chunk):
            if rows.start == rows.stop:
                continue
            states = hidden[rows].to(weight.dtype)
            logits = logits_into(buffer[: len(states)], states, weight)
            softmax = Softmax(peak[rows], log_total[rows], logprob[rows], entropies[rows] if ctx.entropy else None)
            d_logits = head.kernels.write_gradient(
                logits, local[rows], head.columns, head.scale, softmax, grad_logprob[rows],
                None if grad_entropy is None else grad_entropy[rows], weight.dtype,
            )  # fmt: skip
            if grad_hidden is not None:
                grad_hidden[rows] = (d_logits @ weight).to(hidden.dtype)
            if grad_weight is not None:
                accumulate_weight_gradient(grad_weight, d_logits, states)
        if grad_hidden is not None and head.group is not None:
            dist.all_reduce(grad_hidden, group=head.group)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None
