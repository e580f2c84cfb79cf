"""Credits and weights of single tokens in the loss, against fp64 written out sequence by
sequence.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_efr.algorithms import Objective
from megatron_efr.policy.head import Head, HeadRows
from megatron_efr.policy.logprob_check import fill_behaviour
from megatron_efr.policy.loss import as_means, policy_loss
from megatron_efr.policy.packing import pack, row_weights
from megatron_efr.samples import NOT_DRAWN, PackedBatch, Sample
from tests.conftest import VOCAB, ragged_sequences
from tests.groups import with_columns

HIDDEN, COUNT = 12, 10
UNTRAINED = {3, 7}  # sequences whose weights are all 0
DIVISOR = 50
OBJECTIVES = {
    "clip": Objective(low=0.1, high=0.15),
    "all": Objective(low=0.1, high=0.15, dual=1.3, kl="k3", beta=0.2, bonus=0.02),
    "reweight": Objective(surrogate="reweight", low=1.0, high=0.2, kl="k2", beta=0.1),
    "whole": Objective(ratio="sequence", low=0.05, high=0.08, kl="k1", beta=0.1),
}


def weighed() -> list[Sample]:
    """Ragged weights: about half of the tokens have none, one of the sequences has a single trained
    token.
    """
    rng, made = np.random.default_rng(5), []
    for i, s in enumerate(ragged_sequences(COUNT, seed=5)):
        weight = (
            (0.2 + rng.random(s.response_length))
            * (rng.random(s.response_length) < 0.5)
            * (i not in UNTRAINED)
        )
        if i == 0:
            weight[:] = np.arange(s.response_length) == s.response_length // 2
        made.append(with_columns(s, weight=weight, advantage=rng.normal(size=s.response_length)))
    return made


def token_losses(
    objective: Objective,
    logprob: torch.Tensor,
    entropy: torch.Tensor,
    batch: dict[str, torch.Tensor],
) -> torch.Tensor:
    """One sequence's losses, unweighted, fp64 [tokens]; its ratio is over the trained tokens
    alone.
    """
    a, old, d = batch["advantage"], batch["old_logprob"], batch["reference_logprob"] - logprob
    trained = batch["weight"] > 0
    ratio = (logprob - old).exp()
    # GSPO-token: its value, and the gradient of the token's own log-prob
    if objective.ratio == "sequence":
        mean = (logprob - old)[trained].mean().detach() if trained.any() else torch.zeros(())
        ratio = (mean + logprob - logprob.detach()).exp()
    bounded = ratio.clamp(1 - objective.low, 1 + objective.high)
    if objective.surrogate == "reweight":
        loss = -bounded.detach() * a * logprob
    else:
        loss = -torch.minimum(ratio * a, bounded * a)
        if objective.dual is not None:
            loss = torch.where(a < 0, torch.minimum(loss, -objective.dual * a), loss)
    kl = {"none": 0 * d, "k1": -d, "k2": d**2 / 2, "k3": d.exp() - 1 - d}[objective.loss_kl]
    return loss + objective.beta * kl - objective.bonus * entropy


def aggregated(
    aggregate: str, losses: list[torch.Tensor], weights: list[torch.Tensor]
) -> torch.Tensor:
    """Weighted losses over what is trained: its tokens, then its sequences; all its tokens; or a
    constant.
    """
    sums = torch.stack([(w * loss)[w > 0].sum() for w, loss in zip(weights, losses, strict=True)])
    counts = torch.tensor([float((w > 0).sum()) for w in weights], dtype=torch.float64)
    live = counts > 0
    assert int(live.sum()) == COUNT - len(UNTRAINED)
    if aggregate == "token":
        return sums.sum() / counts.sum()
    return (sums[live] / (counts[live] if aggregate == "sequence" else DIVISOR)).mean()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
def test_loss_and_gradients_equal_fp64(name: str, aggregate: Any) -> None:
    objective = OBJECTIVES[name]
    samples, everyone = weighed(), list(range(COUNT))
    factors = row_weights([s.size for s in samples], everyone, aggregate, DIVISOR)
    assert {i for i in everyone if factors[i] == 0} == UNTRAINED
    batches = [
        pack(samples, part, factors, torch.device("cpu"))
        for part in (everyone[::2], everyone[1::2])
    ]
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(VOCAB, HIDDEN))
    states = [torch.randn(len(batch.targets), HIDDEN, requires_grad=True) for batch in batches]
    for batch, state in zip(batches, states, strict=True):
        noise = torch.randn(2, len(batch.targets))
        now = log_probs(state.detach(), weight.detach()).gather(1, batch.targets[:, None])[:, 0]
        batch.columns["old_logprob"] = now + 0.15 * noise[0]
        batch.columns["reference_logprob"] = now + 0.3 * noise[1]
    head = Head(weight, VOCAB, 1.0, None, sequence_parallel=False, chunk=16, backend="torch")
    values = [
        policy_loss(objective)(HeadRows(head, s, b, 1.0))[0]
        for s, b in zip(states, batches, strict=True)
    ]
    torch.stack(values).sum().backward()

    wide = weight.detach().double().requires_grad_()
    wide_states = [state.detach().double().requires_grad_() for state in states]
    losses: dict[int, torch.Tensor] = {}
    for batch, state in zip(batches, wide_states, strict=True):
        losses |= by_sequence(objective, batch, state, wide)
    weights = [torch.from_numpy(s.columns["weight"]).double() for s in samples]
    want = aggregated(aggregate, [losses[i] for i in everyone], weights)
    want.backward()
    assert float(sum(values).detach()) == pytest.approx(float(want.detach()), rel=1e-5, abs=1e-6)
    for mine, theirs in [(weight, wide), *zip(states, wide_states, strict=True)]:
        assert mine.grad is not None
        assert theirs.grad is not None
        assert float((mine.grad - theirs.grad).norm() / theirs.grad.norm()) <= 1e-5
    for batch, state in zip(batches, states, strict=True):
        assert state.grad is not None
        assert torch.all(state.grad[batch.columns["weight"] == 0] == 0)


def test_no_device_is_asked_if_a_token_was_chosen() -> None:
    """A meta tensor has no values, and to read one raises."""
    (drawn,) = ragged_sequences(1, seed=8)
    begun = np.where(np.arange(drawn.response_length) == 0, NOT_DRAWN, 4)
    told = {"engine_logprob": -1.0, "old_logprob": -1.0}
    chosen = with_columns(drawn, version=begun, **told)
    forced = with_columns(chosen, weight=begun == 4)
    plain = with_columns(drawn, version=4, **told)
    batches = [
        pack([sample], [0], {0: 1.0}, torch.device("meta"))
        for sample in (chosen, forced, plain, drawn)
    ]
    fill_behaviour(batches)
    assert ["behaviour_logprob" in batch.columns for batch in batches] == [
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize("name", ["clip", "whole"])
def test_the_ratio_of_a_chosen_token_is_to_its_chance(name: str) -> None:
    """AdaptThink's opening: the policy's probability over 0.5, in fp64; how far the policy moved is
    not to that.
    """
    objective, chance = OBJECTIVES[name], 0.5
    drawn = ragged_sequences(6, seed=8)
    versions = [
        [NOT_DRAWN] * (i % 2) + [4] * (s.response_length - i % 2) for i, s in enumerate(drawn)
    ]
    drawn = [with_columns(s, version=version) for s, version in zip(drawn, versions, strict=True)]
    factors = row_weights([s.size for s in drawn], list(range(6)), "sequence")
    batch = pack(drawn, list(range(6)), factors, torch.device("cpu"))
    torch.manual_seed(1)
    weight, states = (
        torch.nn.Parameter(torch.randn(VOCAB, HIDDEN)),
        torch.randn(len(batch.targets), HIDDEN),
    )
    states.requires_grad_()
    now = log_probs(states.detach(), weight.detach()).gather(1, batch.targets[:, None])[:, 0]
    before = now + 0.1 * torch.randn(len(now))
    chosen = batch.columns["version"] == NOT_DRAWN
    assert int(chosen.sum()) == 3
    batch.columns["engine_logprob"] = torch.where(chosen, math.log(chance), before)
    batch.columns["old_logprob"], batch.columns["reference_logprob"] = before, before
    fill_behaviour([batch])
    head = Head(weight, VOCAB, 1.0, None, sequence_parallel=False, chunk=16, backend="torch")
    value, figures = policy_loss(objective)(HeadRows(head, states, batch, 1.0))
    value.backward()

    wide, wide_states = (each.detach().double().requires_grad_() for each in (weight, states))
    ratios_to = torch.where(chosen, math.log(chance), before.double())
    exact = replace(
        batch, columns={**batch.columns, "old_logprob": ratios_to, "weight": torch.ones(len(now))}
    )
    losses = by_sequence(objective, exact, wide_states, wide)
    want = torch.stack([loss.mean() for loss in losses.values()]).mean()
    want.backward()
    assert float(value.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    for mine, theirs in ((weight, wide), (states, wide_states)):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert float((mine.grad - theirs.grad).norm() / theirs.grad.norm()) <= 1e-5
    moved = [part.double() for part in (now - before).split(batch.row_lengths)]
    means = torch.stack([part.mean() for part in moved])
    top = means.max() if name == "whole" else torch.cat(moved).max()
    assert float(figures["ratio_max"]) == pytest.approx(float(top.exp()), rel=1e-5)
    assert float(figures["kl_to_old"]) == pytest.approx(float(-means.mean()), rel=1e-4)


def test_the_largest_ratio_is_of_trained_tokens() -> None:
    (one,) = ragged_sequences(1)
    off = np.arange(one.response_length) % 2
    batch = pack([with_columns(one, weight=off)], [0], {0: 1.0}, torch.device("cpu"))
    torch.manual_seed(2)
    weight, states = (
        torch.nn.Parameter(torch.randn(VOCAB, HIDDEN)),
        torch.randn(len(batch.targets), HIDDEN),
    )
    now = log_probs(states, weight.detach()).gather(1, batch.targets[:, None])[:, 0]
    batch.columns["old_logprob"] = now - torch.where(batch.columns["weight"] > 0, 0.25, 3.0)
    head = Head(weight, VOCAB, 1.0, None, sequence_parallel=False, chunk=16, backend="torch")
    for objective in (OBJECTIVES["clip"], Objective(ratio="sequence")):
        with torch.no_grad():
            _, figures = policy_loss(objective)(HeadRows(head, states, batch, 1.0))
        assert float(figures["ratio_max"]) == pytest.approx(math.exp(0.25), rel=1e-5)


def log_probs(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(states @ weight.t(), -1)


def by_sequence(
    objective: Objective, batch: PackedBatch, states: torch.Tensor, weight: torch.Tensor
) -> dict[int, torch.Tensor]:
    """The losses of a micro-batch's sequences."""
    whole = log_probs(states, weight)
    measured = {
        "logprob": whole.gather(1, batch.targets[:, None])[:, 0],
        "entropy": -(whole.exp() * whole).sum(-1),
        **{name: values.double() for name, values in batch.columns.items()},
    }
    split = {name: values.split(batch.row_lengths) for name, values in measured.items()}
    parts = [{name: split[name][k] for name in split} for k in range(len(batch.indices))]
    return {
        i: token_losses(objective, part["logprob"], part["entropy"], part)
        for i, part in zip(batch.indices, parts, strict=True)
    }


def test_figures_are_means_whatever_the_weights_sum_to() -> None:
    figures = {"loss": 3.0, "entropy": 0.5, "clip_fraction": 0.1}
    assert as_means(figures | {"weight": 0.25}) == {
        "loss": 3.0,
        "entropy": 2.0,
        "clip_fraction": 0.4,
    }
    assert as_means(figures | {"weight": 1.0 + 3e-7}) == figures, "rounding of weights is no weight"
    nothing = as_means({"loss": 0.0, "entropy": 0.0, "clip_fraction": 0.0, "weight": 0.0})
    assert np.isnan(nothing.pop("entropy"))
    assert nothing == {"loss": 0.0, "clip_fraction": 0.0}
