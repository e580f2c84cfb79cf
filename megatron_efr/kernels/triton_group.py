"""Rewards, RLOO and per-token advantages of whole groups in one Triton launch: one program per response."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 1024  # tokens in flight per program
WARPS = 4


@triton.jit(do_not_specialize=["samples"], do_not_specialize_on_alignment=["log_ratios", "per_token"])
def group_kernel(
    correct, lengths, starts, log_ratios, rewards, advantages, per_token, samples, alpha, beta,
    KL: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The formulas of `group_advantages`; each program computes its prompt's statistics anew, they are few numbers."""
    sample = tl.program_id(0)
    prompt = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, SAMPLES)
    there = lane < samples
    c = tl.load(correct + prompt * samples + lane, mask=there, other=0).to(tl.float64)
    n = tl.load(lengths + prompt * samples + lane, mask=there, other=0).to(tl.float64)
    count = tl.maximum(tl.sum(c, 0), 1.0)
    away = n - tl.sum(c * n, 0) / count
    deviation = tl.sqrt(tl.sum(c * away * away, 0) / count)
    reward = c * (1.0 - alpha / (1.0 + tl.exp(-c * away / (deviation + 1e-7))))
    others = samples.to(tl.float64)
    advantage = (reward - tl.sum(reward, 0) / others) * (others / (others - 1.0))
    mine = tl.sum(tl.where(lane == sample, advantage, 0.0), 0)
    place = prompt * samples + sample
    tl.store(rewards + place, tl.sum(tl.where(lane == sample, reward, 0.0), 0))
    tl.store(advantages + place, mine)
    length = tl.load(lengths + place)
    last = tl.load(starts + place) + length - 1
    to_go = tl.zeros((), tl.float64)
    for done in range(0, length, BLOCK):
        back = done + tl.arange(0, BLOCK)  # tokens counted from the response's end
        inside = back < length
        value = tl.zeros((BLOCK,), tl.float64)
        if KL:
            log_ratio = tl.load(log_ratios + last - back, mask=inside, other=0.0).to(tl.float64)
            # rounded where methods round: the KL to go, then the difference, are fp32
            value = (tl.cumsum(log_ratio, 0) + to_go).to(tl.float32).to(tl.float64)
            to_go += tl.sum(log_ratio, 0)
        tl.store(per_token + last - back, (mine - beta * value).to(tl.float32), mask=inside)


def group_rows(
    correct: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    log_ratios: torch.Tensor | None,
    tokens: int,
    alpha: float,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards and advantages fp64 [prompts, samples], advantages per token fp32 [tokens]."""
    prompts, samples = lengths.shape
    rewards, advantages = torch.empty(2, prompts, samples, dtype=torch.float64, device=lengths.device).unbind()
    per_token = torch.empty(tokens, dtype=torch.float32, device=lengths.device)
    if prompts:
        kernel: Any = group_kernel
        kernel[(samples, prompts)](
            correct, lengths, starts, per_token if log_ratios is None else log_ratios, rewards, advantages, per_token,
            samples, alpha, beta, KL=log_ratios is not None, SAMPLES=max(triton.next_power_of_2(samples), 2),
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return rewards, advantages, per_token
