"""The log-prob head: chunked over tokens, tensor parallel, with its own backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_efr.kernels.backend import Backend, row_kernels
from megatron_efr.kernels.matmul import accumulate_weight_gradient, logits_into
from megatron_efr.kernels.row_kernels import (
    ELSEWHERE,
    OUTSIDE,
    Logits,
    RowKernels,
    Softmax,
    chunks,
    merge,
)

CHUNK_TOKENS = 2048  # for each tensor-parallel rank: fp32 logits held at once, 1.2 GB at V = 152k
CHUNK_BYTES_CPU = 2**28  # of them at most on a CPU, whose products are as fast with fewer rows


class Shard(NamedTuple):
    """Shard of the head: all that log-probs depend on besides hidden, weight and targets."""

    kernels: RowKernels
    scale: float  # 1 / temperature
    # this rank's rows of the weight that lie in the true vocabulary; the rest is padding
    columns: int
    group: dist.ProcessGroup | None  # None if there is nobody to merge with
    sums_hidden: bool  # whether the gradient of hidden is summed over the group here
    chunk: int

    def logits(
        self,
        buffer: torch.Tensor,
        states: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
    ) -> Logits:
        """Logits of a chunk's states [rows, H], in the buffer."""
        return Logits(
            logits_into(buffer[: len(states)], states, weight), targets, self.columns, self.scale
        )

    def softmax(self, logits: Logits, entropy: bool) -> Softmax:
        """Softmax over the whole vocabulary, from this rank's logits; a collective."""
        return merge(self.kernels.statistics(logits, entropy), logits.targets, entropy, self.group)

    def sum_hidden(self, gradient: torch.Tensor) -> None:
        """Sum the gradient of hidden [T, H] over the ranks, in place: each has its rows' part."""
        if self.group is not None and self.sums_hidden:
            dist.all_reduce(gradient, group=self.group)


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    true_vocab: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sum_hidden: bool = True,
    entropy: bool = False,
    chunk: int | None = None,
    live: int | None = None,
    backend: Backend = "torch",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log softmax(hidden @ weight.T / temperature)[target] and, if asked for, the entropy of that
    distribution.

    `hidden` [T, H], `weight` [V_local, H] (this tensor-parallel rank's rows of the head), `targets`
    int64 [T], each in [0, true_vocab): the log-prob of another is nan, since an error would have to
    wait for the card. Columns from `true_vocab` on are padding and get no probability. Returns fp32
    [T] and fp32 [T] or None; differentiable in hidden and weight through both. At most [chunk,
    V_local] logits exist at a time; the backward pass makes them again, but for rows from `live`
    on, which get no gradient: the caller knows that theirs is 0.

    The gradient of `hidden` comes back summed over `tp_group`; with `sum_hidden` off it is this
    rank's part, for a caller whose own backward pass sums (the reduce-scatter of sequence
    parallelism).
    """
    # targets as columns of this rank; the function makes logits chunk by chunk
    shard, local = prepare(
        weight, targets, temperature, true_vocab, tp_group, sum_hidden, chunk, backend
    )
    logprob, entropies = _LinearLogprob.apply(hidden, weight, local, shard, entropy, live)
    return logprob, entropies if entropy else None


def prepare(
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    true_vocab: int | None,
    tp_group: dist.ProcessGroup | None,
    sum_hidden: bool,
    chunk: int | None,
    backend: Backend,
) -> tuple[Shard, torch.Tensor]:
    """This rank's shard of the head, and the targets [T] as `Logits` has them."""
    ranks = 1 if tp_group is None else dist.get_world_size(tp_group)
    first = 0 if tp_group is None else dist.get_rank(tp_group) * weight.shape[0]
    vocabulary = weight.shape[0] * ranks if true_vocab is None else true_vocab
    columns = min(max(vocabulary - first, 0), weight.shape[0])
    local = torch.where(
        (targets >= first) & (targets < first + columns), targets - first, ELSEWHERE
    )
    local.masked_fill_((targets < 0) | (targets >= vocabulary), OUTSIDE)
    group = tp_group if ranks > 1 else None
    size = chunk or default_chunk(weight.shape[0], ranks, weight.device)
    return Shard(row_kernels(backend), 1.0 / temperature, columns, group, sum_hidden, size), local


def default_chunk(rows: int, ranks: int, device: torch.device) -> int:
    """Tokens whose logits exist at a time.

    `rows`: rows of the weight on each of `ranks` tensor-parallel ranks.
    """
    tokens = CHUNK_TOKENS * ranks
    return tokens if device.type == "cuda" else max(1, min(tokens, CHUNK_BYTES_CPU // (4 * rows)))


def logits_buffer(rows: int, weight: torch.Tensor, chunk: int) -> torch.Tensor:
    """Memory of one chunk's logits, fp32 [min(rows, chunk), V_local]; every chunk uses it again."""
    return torch.empty(min(rows, chunk), weight.shape[0], dtype=torch.float32, device=weight.device)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        shard: Shard,
        entropy: bool,
        live: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = hidden.shape[0]
        logprob, peak, log_total = torch.empty(3, tokens, dtype=torch.float32, device=hidden.device)
        entropies = torch.empty_like(logprob) if entropy else logprob.new_empty(0)
        buffer = logits_buffer(tokens, weight, shard.chunk)
        for rows in chunks(tokens, shard.chunk):
            logits = shard.logits(buffer, hidden[rows].to(weight.dtype), weight, targets[rows])
            softmax = shard.softmax(logits, entropy)
            logprob[rows], peak[rows], log_total[rows] = (
                softmax.logprob,
                softmax.peak,
                softmax.log_total,
            )
            if softmax.entropy is not None:
                entropies[rows] = softmax.entropy
        ctx.shard = shard
        ctx.entropy = entropy
        ctx.live = tokens if live is None else live
        ctx.save_for_backward(hidden, weight, targets, peak, log_total, logprob, entropies)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logprob, entropies

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, peak, log_total, logprob, entropies = ctx.saved_tensors
        shard: Shard = ctx.shard
        grad_logprob = grads[0].contiguous()  # it may come expanded
        grad_entropy = grads[1].contiguous() if ctx.entropy else None
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        # accumulated over chunks in fp32: in bf16 the error would grow with the number of chunks
        grad_weight = (
            torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        # logits again, a chunk at a time: [tokens, vocabulary] never stands as a whole
        buffer = logits_buffer(ctx.live, weight, shard.chunk)
        for rows in chunks(ctx.live, shard.chunk):
            states = hidden[rows].to(weight.dtype)
            logits = shard.logits(buffer, states, weight, targets[rows])
            softmax = Softmax(
                peak[rows], log_total[rows], logprob[rows], entropies[rows] if ctx.entropy else None
            )
            d_logits = shard.kernels.write_gradient(
                logits,
                softmax,
                grad_logprob[rows],
                None if grad_entropy is None else grad_entropy[rows],
                weight.dtype,
            )
            # both products of the head, while the chunk is in memory
            if grad_hidden is not None:
                grad_hidden[rows] = (d_logits @ weight).to(hidden.dtype)
            if grad_weight is not None:
                accumulate_weight_gradient(grad_weight, d_logits, states)
        if grad_hidden is not None:
            # each tensor rank saw the hidden states through its part of the vocabulary
            shard.sum_hidden(grad_hidden)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None,
            None,
            None,
        )
