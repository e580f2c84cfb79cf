"""The chunked log-prob head against fp64 log-softmax, values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_efr.kernels import linear_logprob


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    vocab: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (hidden.double() @ weight.double()[:vocab].t()) / temperature
    log_probs = torch.log_softmax(logits, dim=-1)
    return log_probs.gather(1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


def case(tokens: int, hidden: int, rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, hidden, generator=generator, requires_grad=True),
        torch.randn(rows, hidden, generator=generator).mul_(0.5).requires_grad_(),
    )


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@given(
    tokens=st.integers(1, 40),
    hidden=st.integers(1, 24),
    vocab=st.integers(2, 70),
    padding=st.integers(0, 9),
    chunk=st.integers(1, 50),
    temperature=st.sampled_from([0.6, 1.0, 1.7]),
)
@settings(max_examples=60, deadline=None)
def test_values_and_gradients(
    tokens: int, hidden: int, vocab: int, padding: int, chunk: int, temperature: float
) -> None:
    x, w = case(tokens, hidden, vocab + padding)
    targets = torch.arange(tokens) % vocab  # touches the first and the last column
    logprob, entropy = linear_logprob(
        x, w, targets, temperature=temperature, true_vocab=vocab, entropy=True, chunk=chunk
    )
    assert entropy is not None
    exact, exact_entropy = reference(x, w, targets, temperature, vocab)
    assert (logprob - exact).abs().max() < 1e-5
    assert (entropy - exact_entropy).abs().max() < 1e-5
    g, h = torch.linspace(-1, 2, tokens), torch.linspace(0.5, -1, tokens)
    got = torch.autograd.grad((logprob * g + entropy * h).sum(), [x, w])
    want = torch.autograd.grad((exact * g.double() + exact_entropy * h.double()).sum(), [x, w])
    assert relative(got[0], want[0]) < 1e-5
    assert relative(got[1], want[1]) < 1e-5
    assert torch.all(got[1][vocab:] == 0), "padding rows of the head get exactly no gradient"


def test_logprob_alone_and_chunk_invariance() -> None:
    x, w = case(37, 16, 50)
    targets = torch.arange(37)
    whole, nothing = linear_logprob(x, w, targets)
    assert nothing is None
    assert (whole - reference(x, w, targets, 1.0, 50)[0]).abs().max() < 1e-5
    for chunk in (1, 5, 36):
        assert (linear_logprob(x, w, targets, chunk=chunk)[0] - whole).abs().max() < 1e-6


@pytest.mark.parametrize("offset", [1e4, -300.0])
def test_extreme_logits_stay_exact(offset: float) -> None:
    x = torch.ones(3, 1, dtype=torch.float32)
    w = (torch.arange(5.0)[:, None] + offset).requires_grad_()
    logprob, _ = linear_logprob(x, w, torch.tensor([0, 2, 4]))
    exact = torch.log_softmax(torch.arange(5.0).double(), 0)[[0, 2, 4]]
    assert (logprob - exact).abs().max() < 1e-3  # fp32 holds 1e4 + 4 to 1e-3
    assert torch.isfinite(logprob).all()


def test_expanded_gradient() -> None:
    x, w = case(9, 8, 12)
    targets = torch.arange(9)
    expanded = torch.autograd.grad(linear_logprob(x, w, targets)[0].sum(), x)[0]
    dense = torch.autograd.grad((linear_logprob(x, w, targets)[0] * torch.ones(9)).sum(), x)[0]
    assert torch.equal(expanded, dense)


def test_bf16_accumulates_over_chunks_in_fp32() -> None:
    x, w = case(256, 32, 40)
    xb, wb = x.detach().bfloat16().requires_grad_(), w.detach().bfloat16().requires_grad_()
    targets = torch.arange(256) % 40
    one = torch.autograd.grad(linear_logprob(xb, wb, targets, chunk=256)[0].sum(), wb)[0]
    many = torch.autograd.grad(linear_logprob(xb, wb, targets, chunk=4)[0].sum(), wb)[0]
    exact = torch.autograd.grad(reference(xb, wb, targets, 1.0, 40)[0].sum(), wb)[0]
    # a bf16 sum of 64 chunks would be off by several 1e-2
    assert relative(many, exact) < max(8e-3, 1.5 * relative(one, exact))


def test_a_target_outside_the_vocabulary_has_no_number() -> None:
    x, w = case(3, 4, 8)
    logprob, _ = linear_logprob(x, w, torch.tensor([0, -1, 7]), true_vocab=7)
    assert logprob.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("live", [0, 5, 9, 11])
def test_rows_that_are_not_live_get_no_gradient(live: int) -> None:
    x, w = case(11, 8, 12)
    targets = torch.arange(11)
    got = torch.autograd.grad(linear_logprob(x, w, targets, chunk=4, live=live)[0].sum(), [x, w])
    want = torch.autograd.grad(
        reference(x, w, targets, 1.0, 12)[0][:live].sum(), [x, w], materialize_grads=True
    )
    assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(got, want, strict=True))
    assert torch.all(got[0][live:] == 0)


def test_repeats_bit_for_bit() -> None:
    x, w = case(64, 16, 50)
    targets = torch.arange(64) % 50
    runs = [
        torch.autograd.grad(linear_logprob(x, w, targets, chunk=9)[0].sum(), [x, w])
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
