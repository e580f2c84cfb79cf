"""From graded groups to one advantage per token, on the device: the paper's reward, RLOO, the KL to go.

For loops that hold whole groups on one device. This project's trainer does not: its rewards are any registered
method's, made on rank 0, and its packs deal a group's responses out over replicas, micro-batches and context ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_efr.kernels.backend import Backend


class GroupAdvantages(NamedTuple):
    """fp64 [prompts, samples] twice, and fp32 [tokens]: responses end to end, prompt by prompt."""

    rewards: torch.Tensor
    advantages: torch.Tensor
    per_token: torch.Tensor


def group_advantages(
    correct: torch.Tensor,
    lengths: torch.Tensor,
    log_ratios: torch.Tensor | None,
    *,
    alpha: float,
    beta: float,
    backend: Backend = "torch",
) -> GroupAdvantages:
    """Arora & Zanette 2025 (arXiv 2502.04463), equations 4 and 5, section 4, and the KL in the reward:

        r_i     = c_i (1 - alpha sigmoid((len_i - mean_C) / (std_C + 1e-7)))
        A_i     = r_i - mean of the prompt's other r_j
        A_{i,t} = A_i - beta sum_{t' >= t} log_ratio_{i,t'}

    mean and (population) standard deviation over the prompt's correct responses. `correct` bool [prompts, samples]
    (False where a response was cut off), `lengths` int64 [prompts, samples] in tokens, `log_ratios` fp32 [sum of
    lengths]: log pi_old - log pi_initial, responses end to end; None for no KL term. The same numbers as
    `methods.EFR` with `fill_token_advantages`, in one launch. ValueError for shapes that disagree or fewer than two
    samples.
    """
    prompts, samples = lengths.shape
    if correct.shape != lengths.shape or samples < 2:
        shapes = f"correct {tuple(correct.shape)}, lengths {tuple(lengths.shape)}"
        raise ValueError(f"{shapes}: expected one shape, [prompts, samples], of at least 2 samples")
    ends = lengths.flatten().cumsum(0)
    tokens = int(ends[-1]) if prompts else 0
    if log_ratios is not None and log_ratios.shape != (tokens,):
        raise ValueError(f"log_ratios {tuple(log_ratios.shape)}: the lengths add up to {tokens} tokens")
    correct, lengths = correct.contiguous(), lengths.contiguous()
    starts = (ends - lengths.flatten()).contiguous()
    if backend == "triton":
        from megatron_efr.kernels.triton_group import group_rows

        ratios = None if log_ratios is None else log_ratios.contiguous()
        return GroupAdvantages(*group_rows(correct, lengths, starts, ratios, tokens, alpha, beta))
    return _group_rows(correct, lengths, starts, log_ratios, alpha, beta)


def _group_rows(
    correct: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    log_ratios: torch.Tensor | None,
    alpha: float,
    beta: float,
) -> GroupAdvantages:
    """The kernel's twin."""
    c, n = correct.double(), lengths.double()
    count = c.sum(-1, keepdim=True).clamp(min=1.0)
    away = n - (c * n).sum(-1, keepdim=True) / count
    deviation = ((c * away**2).sum(-1, keepdim=True) / count).sqrt()
    rewards = c * (1.0 - alpha * torch.sigmoid(c * away / (deviation + 1e-7)))
    samples = lengths.shape[1]
    advantages = (rewards - rewards.mean(-1, keepdim=True)) * (samples / (samples - 1))
    row_lengths = lengths.flatten()
    per_token = advantages.flatten().repeat_interleave(row_lengths)
    if log_ratios is not None:
        to_go = torch.empty_like(log_ratios)
        for part, out in zip(log_ratios.split(row_lengths.tolist()), to_go.split(row_lengths.tolist()), strict=True):
            out.copy_(part.double().flip(0).cumsum(0).flip(0))
        per_token = per_token - beta * to_go.double()
    return GroupAdvantages(rewards, advantages, per_token.float())
