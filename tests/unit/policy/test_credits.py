"""Per-token advantages against fp64: the KL to go, whitening over an iteration, tokens that are not
trained.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_efr.algorithms import Objective, Spread
from megatron_efr.kernels.token_credits import kl_to_go
from megatron_efr.policy.credits import fill_advantages
from megatron_efr.samples import PackedBatch

REWARD = Objective(kl="reward", beta=0.01)


def batch(
    lengths: list[int], advantages: list[float], seed: int, trained: float = 1.0
) -> PackedBatch:
    """Responses with one advantage each; a token is trained with that probability, with a weight of
    its own.
    """
    rows = sum(lengths)
    generator = torch.Generator().manual_seed(seed)
    empty = torch.empty(0)
    return PackedBatch(
        tokens=empty, positions=empty, lengths=lengths, cu_seqlens=empty, rows=empty, targets=empty,
        row_lengths=lengths, indices=list(range(len(lengths))), live=len(lengths),
        columns={
            "advantage": torch.tensor(advantages).repeat_interleave(torch.tensor(lengths,
                dtype=torch.int64)),
            "old_logprob": torch.randn(rows, generator=generator),
            "reference_logprob": torch.randn(rows, generator=generator),
            "weight": torch.rand(rows, generator=generator) * (torch.rand(rows,
                generator=generator) < trained),
        },
    )  # fmt: skip


def expected_advantages(batches: list[PackedBatch], beta: float) -> np.ndarray:
    """A_t - beta * sum_{t' >= t} (log pi_old - log pi_ref) over trained tokens, in fp64 loops."""
    result = []
    for b in batches:
        advantage, old, reference, weight = (
            b.columns[name].double().tolist()
            for name in ("advantage", "old_logprob", "reference_logprob", "weight")
        )
        start = 0
        for n in b.row_lengths:
            for t in range(start, start + n):
                ratios = [old[u] - reference[u] for u in range(t, start + n) if weight[u] > 0]
                result.append(advantage[t] - beta * sum(ratios))
            start += n
    return np.array(result)


def filled(batches: list[PackedBatch], objective: Objective) -> np.ndarray:
    fill_advantages(batches, objective, lambda t: t)
    return torch.cat([b.columns["advantage"] for b in batches]).double().numpy()


def test_token_advantages_against_fp64() -> None:
    for trained in (1.0, 0.5):
        batches = [batch([3, 1, 7], [2.0, 0.5, -1.0], 0, trained), batch([5], [0.0], 1, trained)]
        want = expected_advantages(batches, 0.01)
        assert np.abs(filled(batches, REWARD) - want).max() < 1e-6


def test_batch_normalisation_is_token_weighted_over_trained_tokens() -> None:
    for trained in (1.0, 0.5):
        batches = [batch([3, 1, 7], [2.0, 0.5, -1.0], 0, trained), batch([5], [0.0], 1, trained)]
        flat = expected_advantages(batches, 0.01)
        counted = flat[torch.cat([b.columns["weight"] for b in batches]).numpy() > 0]
        assert (len(counted) == len(flat)) == (trained == 1.0)
        got = filled(batches, REWARD._replace(tokens=Spread()))
        assert np.abs(got - (flat - counted.mean()) / counted.std()).max() < 1e-6


def test_whitening_without_a_trained_token_stays_finite() -> None:
    batches = [batch([3, 2], [1.0, 2.0], 0, trained=0.0)]
    assert np.isfinite(filled(batches, Objective(tokens=Spread("sample", "variance")))).all()


def test_without_beta_the_reference_is_not_read() -> None:
    b = batch([2, 3], [1.5, -2.0], 0)
    del b.columns["old_logprob"], b.columns["reference_logprob"]
    for objective in (Objective(), Objective(kl="reward")):
        assert filled([b], objective).tolist() == [1.5, 1.5, -2.0, -2.0, -2.0]


def test_sequences_without_an_advantage_have_one_after_filling() -> None:
    for objective, live in (
        (Objective(), 1),
        (REWARD, None),  # the KL to go gives every token one
        (Objective(tokens=Spread()), None),  # and the mean taken off
    ):
        b = batch([3, 4], [1.0, 0.0], 0)
        b.live = 1
        fill_advantages([b], objective, lambda t: t)
        assert (b.live, b.live_rows) == (live, 3 if live else 7)


def test_an_empty_micro_batch_takes_part() -> None:
    batches = [batch([3, 2], [1.0, 2.0], 0), batch([], [], 1)]
    filled(batches, Objective(kl="reward", beta=0.1, tokens=Spread()))
    assert batches[1].columns["advantage"].shape == (0,)


def test_kl_to_go_restarts_in_each_response() -> None:
    assert kl_to_go(torch.tensor([1.0, 2.0, 3.0, 10.0]), [3, 1]).tolist() == [6.0, 5.0, 3.0, 10.0]
