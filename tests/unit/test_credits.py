"""Per-token advantages against fp64: the KL to go, whitening over an iteration, what the host knows."""

from __future__ import annotations

import numpy as np
import torch

from megatron_efr.algorithms import Objective, Spread
from megatron_efr.kernels.token_credits import kl_to_go
from megatron_efr.policy.credits import fill_advantages
from megatron_efr.types import PackedBatch


def batch(lengths: list[int], indices: list[int], seed: int) -> PackedBatch:
    rows = sum(lengths)
    generator = torch.Generator().manual_seed(seed)
    empty = torch.empty(0)
    return PackedBatch(
        tokens=empty, positions=empty, lengths=lengths, cu_seqlens=empty, rows=empty, targets=empty,
        row_lengths=lengths, indices=indices, weights=torch.ones(rows),
        old_logprobs=torch.randn(rows, generator=generator), reference_logprobs=torch.randn(rows, generator=generator),
    )  # fmt: skip


def expected_advantages(batches: list[PackedBatch], advantages: list[float], beta: float) -> list[np.ndarray]:
    """A_{i,t} = A_i - beta * sum_{t' >= t} (log pi_old - log pi_ref), in fp64 loops."""
    result = []
    for b in batches:
        assert b.old_logprobs is not None
        assert b.reference_logprobs is not None
        ratio = (b.old_logprobs.double() - b.reference_logprobs.double()).numpy()
        start = 0
        for i, n in zip(b.indices, b.row_lengths, strict=True):
            result.append(
                np.array([advantages[i] - beta * ratio[t : start + n].sum() for t in range(start, start + n)])
            )
            start += n
    return result


def test_token_advantages_against_fp64() -> None:
    batches = [batch([3, 1, 7], [2, 0, 1], 0), batch([5], [3], 1)]
    advantages = [0.5, -1.0, 2.0, 0.0]
    fill_advantages(batches, advantages, Objective(kl="reward", beta=0.01), lambda t: t)
    got = torch.cat([b.advantages for b in batches if b.advantages is not None]).numpy()
    assert np.abs(got - np.concatenate(expected_advantages(batches, advantages, 0.01))).max() < 1e-6


def test_batch_normalisation_is_token_weighted() -> None:
    batches = [batch([3, 1, 7], [2, 0, 1], 0), batch([5], [3], 1)]
    advantages = [0.5, -1.0, 2.0, 0.0]
    fill_advantages(batches, advantages, Objective(kl="reward", beta=0.01, tokens=Spread()), lambda t: t)
    got = torch.cat([b.advantages for b in batches if b.advantages is not None]).double().numpy()
    flat = np.concatenate(expected_advantages(batches, advantages, 0.01))
    assert np.abs(got - (flat - flat.mean()) / flat.std()).max() < 1e-6


def test_without_beta_the_reference_is_not_read() -> None:
    b = batch([2, 3], [0, 1], 0)
    b.old_logprobs = b.reference_logprobs = None
    fill_advantages([b], [1.5, -2.0], Objective(), lambda t: t)
    assert b.advantages is not None
    assert b.advantages.tolist() == [1.5, 1.5, -2.0, -2.0, -2.0]


def test_which_sequences_may_have_an_advantage_is_known_on_the_host() -> None:
    fresh = [batch([3, 1, 7], [2, 0, 1], 0), batch([5], [3], 1)]
    advantages = [0.0, -1.0, 2.0, 0.0]  # of which the first batch has 2.0, 0.0, -1.0
    for config, live in (
        (Objective(), [3, 0]),
        (Objective(kl="reward", beta=0.1), [None, None]),  # the KL to go gives every token one
        (Objective(tokens=Spread()), [None, None]),  # and the mean taken off
    ):
        fill_advantages(fresh, advantages, config, lambda t: t)
        assert [b.live for b in fresh] == live
    advantages[1] = 0.0
    fill_advantages(fresh, advantages, Objective(), lambda t: t)
    assert [b.live_rows for b in fresh] == [3, 0]


def test_an_empty_micro_batch_takes_part() -> None:
    batches = [batch([3, 2], [0, 1], 0), batch([], [], 1)]
    fill_advantages(batches, [1.0, 2.0], Objective(kl="reward", beta=0.1, tokens=Spread()), lambda t: t)
    assert batches[1].advantages is not None
    assert batches[1].advantages.shape == (0,)


def test_kl_to_go_restarts_in_each_response() -> None:
    assert kl_to_go(torch.tensor([1.0, 2.0, 3.0, 10.0]), [3, 1]).tolist() == [6.0, 5.0, 3.0, 10.0]
