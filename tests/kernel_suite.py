"""Every Triton kernel against fp64, on a card or under Triton's interpreter.

Collected by tests/unit/kernels/test_interpreted.py, in a process of its own with
TRITON_INTERPRET=1, and by tests/gpu/test_kernels.py. The interpreter computes bf16 wrongly, so
16-bit here is fp16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_efr.algorithms import Objective
from megatron_efr.kernels import (
    PolicyRows,
    fused_policy_loss,
    linear_logprob,
    token_credits,
    torch_rows,
    triton_credits,
    triton_rows,
)
from megatron_efr.kernels.row_kernels import Logits, merge

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP16 = [torch.float32, torch.float16]
# gradients, relative to their norm
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
KINDS = ["none", "k1", "k2", "k3"]


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    """Blocks of 16, so that short rows take several; the shipped sizes have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_rows, "BLOCK", 16)
        patch.setattr(triton_credits, "BLOCK", 16)
        yield


def case(
    tokens: int, hidden: int, rows: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens * 1000 + rows)
    x = torch.randn(tokens, hidden, generator=generator).to(DEVICE, dtype).requires_grad_()
    w = torch.randn(rows, hidden, generator=generator).mul_(0.5).to(DEVICE, dtype).requires_grad_()
    return x, w


def exact(
    x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, temperature: float, vocab: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies in fp64 from materialised logits."""
    log_probs = torch.log_softmax((x.double() @ w.double()[:vocab].t()) / temperature, dim=-1)
    return log_probs.gather(1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max())


# -- log-prob head
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FP16)
@given(
    tokens=st.integers(1, 7), hidden=st.integers(1, 12), vocab=st.integers(2, 50),
    padding=st.integers(0, 20),
    chunk=st.integers(1, 8), temperature=st.sampled_from([0.6, 1.0, 1.7]),
    wanted=st.sampled_from(["logprob", "entropy", "both"]),
)  # fmt: skip
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_head(
    dtype: torch.dtype,
    tokens: int,
    hidden: int,
    vocab: int,
    padding: int,
    chunk: int,
    temperature: float,
    wanted: str,
) -> None:
    x, w = case(tokens, hidden, vocab + padding, dtype)
    # the first and the last column among them
    targets = (torch.arange(tokens, device=DEVICE) * (vocab - 1)) % vocab
    logprob, entropy = linear_logprob(
        x, w, targets, temperature=temperature, true_vocab=vocab, entropy=wanted != "logprob",
        chunk=chunk,
        backend="triton",
    )  # fmt: skip
    want, want_entropy = exact(x, w, targets, temperature, vocab)
    assert largest(logprob, want) <= 1e-5
    g = torch.linspace(-1, 2, tokens, device=DEVICE) * (wanted != "entropy")
    h = torch.linspace(0.5, -1, tokens, device=DEVICE)
    value, exact_value = (logprob * g).sum(), (want * g.double()).sum()
    if entropy is not None:
        assert largest(entropy, want_entropy) <= 1e-5
        value, exact_value = (
            value + (entropy * h).sum(),
            exact_value + (want_entropy * h.double()).sum(),
        )
    got, wanted_gradients = (
        torch.autograd.grad(value, [x, w]),
        torch.autograd.grad(exact_value, [x, w]),
    )
    for mine, theirs in zip(got, wanted_gradients, strict=True):
        assert (mine.double() - theirs.double()).norm() <= TOLERANCE[
            dtype
        ] * theirs.double().norm() + 1e-6
    assert torch.all(got[1][vocab:] == 0), "padding rows of the head get exactly no gradient"


@pytest.mark.parametrize("vocab", [4096 - 3, 4096, 4096 + 5])
def test_shipped_block(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rows, "BLOCK", 4096)
    x, w = case(3, 4, vocab + 2)
    targets = torch.tensor([0, vocab - 1, vocab // 2], device=DEVICE)
    logprob, entropy = linear_logprob(
        x, w, targets, true_vocab=vocab, entropy=True, backend="triton"
    )
    want, want_entropy = exact(x, w, targets, 1.0, vocab)
    assert entropy is not None
    assert max(largest(logprob, want), largest(entropy, want_entropy)) <= 1e-5
    got = torch.autograd.grad((logprob + entropy).sum(), [x, w])
    for mine, theirs in zip(
        got, torch.autograd.grad((want + want_entropy).sum(), [x, w]), strict=True
    ):
        assert relative(mine, theirs) <= 1e-5


@pytest.mark.parametrize("offset", [1e4, -300.0])
def test_offsets(offset: float) -> None:
    base = torch.linspace(-8, 4, 37, device=DEVICE)
    base = base.mul(1024).round().div(1024)  # exact in fp32 beside 1e4
    local = torch.tensor([0, 36, 17], device=DEVICE)
    logits = Logits((base + offset)[None].repeat(3, 1), local, 37, 1.0)
    softmax = merge(triton_rows.statistics(logits, True), local, True, None)
    log_probs = torch.log_softmax(logits.values.double(), -1)
    assert largest(softmax.logprob, log_probs[torch.arange(3), local]) <= 1e-5
    assert softmax.entropy is not None
    assert largest(softmax.entropy, -(log_probs.exp() * log_probs).sum(-1)) <= 1e-5


@pytest.mark.parametrize("dtype", FP16)
def test_rows_of_any_dtype_and_stride(dtype: torch.dtype) -> None:
    wide = torch.randn(5, 90, device=DEVICE).to(dtype)
    logits, local = wide[:, :70], torch.tensor([0, 3, -1, 59, 20], device=DEVICE)
    statistics = triton_rows.statistics(Logits(logits, local, 60, 0.7), True)
    assert statistics.target[2] == 0.0, "nothing is read for a target of another rank"
    mine = merge(statistics, local, True, None)
    log_probs = torch.log_softmax(logits[:, :60].double() * 0.7, -1)
    owned = local >= 0
    assert (
        largest(mine.logprob[owned], log_probs.gather(1, local.clamp(min=0)[:, None])[:, 0][owned])
        <= 1e-5
    )
    assert mine.entropy is not None
    assert largest(mine.entropy, -(log_probs.exp() * log_probs).sum(-1)) <= 1e-5


def test_rows_without_a_gradient_are_exactly_zero() -> None:
    logits = torch.randn(4, 40, device=DEVICE)
    logits[1] = float("nan")
    local = torch.tensor([1, 2, 3, 4], device=DEVICE)
    for kernels in (triton_rows, torch_rows):
        block = Logits(logits.clone(), local, 33, 1.0)
        softmax = merge(kernels.statistics(block, True), local, True, None)
        g = torch.tensor([1.0, 0.0, 0.0, -2.0], device=DEVICE)
        d = kernels.write_gradient(block, softmax, g, g * 0.5, torch.float16)
        assert d.dtype == torch.float16
        assert torch.all(d[1:3] == 0)
        assert torch.all(d[:, 33:] == 0)
        assert torch.all(d[[0, 3], :33] != 0)


def test_expanded_gradient_chunks_and_repeats() -> None:
    x, w = case(11, 8, 40)
    targets = torch.arange(11, device=DEVICE)

    def run(chunk: int, expand: bool) -> list[torch.Tensor]:
        logprob, _ = linear_logprob(x, w, targets, chunk=chunk, backend="triton")
        loss = logprob.sum() if expand else (logprob * torch.ones_like(logprob)).sum()
        return [logprob, *torch.autograd.grad(loss, [x, w])]

    first = run(4, True)
    assert all(torch.equal(a, b) for a, b in zip(first, run(4, True), strict=True)), "bit for bit"
    assert all(torch.equal(a, b) for a, b in zip(first, run(4, False), strict=True)), (
        "expanded or dense"
    )
    assert all(relative(a, b) <= 1e-6 for a, b in zip(run(11, True), first, strict=True)), (
        "any chunk"
    )


def test_tied_embedding() -> None:
    x, w = case(6, 8, 40)
    tokens, targets = torch.arange(6, device=DEVICE) * 3, torch.arange(6, device=DEVICE)
    mine = linear_logprob(w[tokens] * x, w, targets, backend="triton")[0].sum()
    theirs = exact(w.double()[tokens] * x, w, targets, 1.0, 40)[0].sum()
    assert relative(torch.autograd.grad(mine, w)[0], torch.autograd.grad(theirs, w)[0]) <= 1e-5


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_target_outside_the_vocabulary_has_no_number(backend: Any) -> None:
    x, w = case(4, 4, 8)
    targets = torch.tensor([0, -1, 7, 6], device=DEVICE)
    logprob, _ = linear_logprob(x, w, targets, true_vocab=7, backend=backend)
    assert logprob.isnan().tolist() == [False, True, True, False]
    main_grad, one = torch.zeros_like(w, requires_grad=False), torch.ones(4, device=DEVICE)
    out = fused_policy_loss(
        x, w, targets, PolicyRows(logprob.detach(), one, one), Objective(), main_grad=main_grad,
        factor=1.0,
        true_vocab=7, backend=backend,
    )  # fmt: skip
    assert out.loss.isnan(), "the step is skipped, and says so"
    assert main_grad.isnan().any()


@pytest.mark.skipif(
    DEVICE != "cpu", reason="a card holds the real thing: test_more_logits_than_an_int32_counts"
)
def test_offsets_beyond_int32(tmp_path: Path) -> None:
    # row 3 begins beyond 2^31 elements; the file has holes, so little of it exists
    stride = 2**30 + 16
    logits = torch.from_file(str(tmp_path / "rows"), shared=True, size=3 * stride + 40).as_strided(
        (4, 40), (stride, 1)
    )
    values = torch.randn(4, 40)
    logits.copy_(values)
    local = torch.tensor([0, 1, 2, 39])
    far, near = (triton_rows.statistics(Logits(v, local, 40, 1.0), True) for v in (logits, values))
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))
    softmax = merge(near, local, True, None)
    g = torch.ones(4)
    gradients = [
        triton_rows.write_gradient(Logits(v, local, 40, 1.0), softmax, g, g, torch.float16)
        for v in (logits, values)
    ]
    assert torch.equal(*gradients)


# -- policy loss
# --------------------------------------------------------------------------------------------------


def policy_case(tokens: int, vocab: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Ratios several clip widths apart, two sequences of advantage 0, a row of weight 0, and
    importance weights.
    """
    x, w = case(tokens, 8, vocab + 3, dtype)
    targets = (torch.arange(tokens, device=DEVICE) * 7) % vocab
    noise = torch.randn(5, tokens, generator=torch.Generator().manual_seed(tokens)).to(DEVICE)
    logprob = exact(x, w, targets, 0.8, vocab)[0].detach().float()
    advantages = noise[1].clone()
    advantages[: tokens // 4] = 0.0
    advantages[-tokens // 4 :] = 0.0
    weights = noise[2].abs() / tokens
    weights[tokens // 2] = 0.0
    importance = (0.5 * noise[4]).exp()
    importance[1::5] = 0.0
    rows = PolicyRows(
        logprob + 0.3 * noise[0], advantages, weights, logprob + 0.3 * noise[3], importance
    )
    return x, w, targets, rows


def exact_policy(
    x: torch.Tensor,
    w: torch.Tensor,
    targets: torch.Tensor,
    rows: PolicyRows,
    objective: Objective,
    vocab: int,
) -> torch.Tensor:
    """The loss in fp64 from materialised logits, for autograd."""
    logprob, entropy = exact(x, w, targets, 0.8, vocab)
    assert rows.reference is not None
    ratio, a = (logprob - rows.old.double()).exp(), rows.advantages.double()
    bounded = ratio.clamp(1 - objective.low, 1 + objective.high)
    if objective.surrogate == "reweight":
        value = -bounded.detach() * a * logprob
    else:
        value = torch.maximum(-ratio * a, -bounded * a)
        if objective.dual is not None:
            value = torch.where(a < 0, torch.minimum(value, -objective.dual * a), value)
    if rows.importance is not None:
        value = value * rows.importance.double()
    d = rows.reference.double() - logprob
    kl = {"none": 0 * d, "k1": -d, "k2": d**2 / 2, "k3": d.exp() - 1 - d}[objective.loss_kl]
    return (rows.weights.double() * (value + objective.beta * kl - objective.bonus * entropy)).sum()


PLAIN = Objective(low=0.1, high=0.05, beta=0.3)
WHOLE = PLAIN._replace(dual=1.06, bonus=0.05)
WEIGHED = Objective(surrogate="reweight", low=1.0, high=0.1, beta=0.3, bonus=0.05)


@pytest.mark.parametrize("dtype", FP16)
@pytest.mark.parametrize("kl", KINDS)
@pytest.mark.parametrize("which", [PLAIN, WHOLE, WEIGHED], ids=["plain", "whole", "weighed"])
def test_policy_loss(dtype: torch.dtype, kl: Any, which: Objective) -> None:
    objective = which._replace(kl=kl)
    x, w, targets, rows = policy_case(25, 45, dtype)
    if which == PLAIN:
        rows = replace(rows, importance=None)
    factor, results = 3.0, {}
    for backend in ("triton", "torch"):
        main_grad = torch.full(w.shape, 0.25, device=DEVICE)
        out = fused_policy_loss(
            x, w, targets, rows, objective, main_grad=main_grad, factor=factor, temperature=0.8,
            true_vocab=45, chunk=9,
            backend=backend,
        )  # fmt: skip
        plain, _ = linear_logprob(
            x, w, targets, temperature=0.8, true_vocab=45, chunk=9, backend=backend
        )
        assert torch.equal(out.logprobs, plain)
        (gradient,) = torch.autograd.grad(out.loss * factor, [x])
        results[backend] = (out.loss.detach(), out.figures, gradient, main_grad - 0.25)
    want = exact_policy(x, w, targets, rows, objective, 45)
    d_hidden, d_weight = torch.autograd.grad(want * factor, [x, w])
    mine, twin = results["triton"], results["torch"]
    assert largest(mine[0], want) <= 1e-5
    assert relative(mine[2], d_hidden) <= TOLERANCE[dtype]
    assert relative(mine[3], d_weight) <= TOLERANCE[dtype]
    assert torch.all(mine[3][45:] == 0)
    assert mine[1].keys() == twin[1].keys()
    assert all(largest(mine[1][name], twin[1][name]) <= 1e-6 for name in mine[1])
    assert min(mine[1]["clip_above"], mine[1]["clip_below"] + (which == WEIGHED)) > 0, (
        "or nothing is shown"
    )
    assert largest(mine[1]["clip_fraction"], mine[1]["clip_above"] + mine[1]["clip_below"]) <= 1e-6
    assert largest(mine[0], twin[0]) <= 1e-6
    if dtype == torch.float32:
        assert relative(mine[2], twin[2]) <= 1e-6
        assert relative(mine[3], twin[3]) <= 1e-6


def test_first_update_has_a_ratio_of_one_exactly() -> None:
    x, w, targets, rows = policy_case(13, 45, torch.float32)
    old = linear_logprob(x, w, targets, chunk=4, backend="triton")[0].detach()
    rows = PolicyRows(old, rows.advantages, rows.weights, old)
    main_grad = torch.zeros_like(w, requires_grad=False)
    out = fused_policy_loss(
        x,
        w,
        targets,
        rows,
        Objective(kl="k3", beta=1.0),
        main_grad=main_grad,
        factor=1.0,
        chunk=4,
        backend="triton",
    )
    assert out.figures["ratio_max"] == 1.0
    assert (
        out.figures["kl_to_old"]
        == out.figures["kl_to_reference"]
        == out.figures["clip_fraction"]
        == 0.0
    )


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_nan_is_passed_on(backend: Any) -> None:
    x, w, targets, rows = policy_case(13, 45, torch.float32)
    rows = PolicyRows(rows.old, torch.full_like(rows.advantages, torch.nan), rows.weights)
    main_grad = torch.zeros_like(w, requires_grad=False)
    out = fused_policy_loss(
        x, w, targets, rows, Objective(), main_grad=main_grad, factor=1.0, chunk=4, backend=backend
    )
    assert out.loss.isnan()
    assert torch.autograd.grad(out.loss, x)[0].isnan().any()
    assert main_grad.isnan().any()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_row_of_weight_0_adds_exactly_0_whatever_it_holds(backend: Any) -> None:
    x, w, targets, rows = policy_case(13, 45, torch.float32)
    assert rows.reference is not None
    assert rows.importance is not None
    objective, results = Objective(kl="k3", beta=0.3, bonus=0.05), []
    off = torch.arange(13, device=DEVICE) % 3 == 0
    for junk in (0.0, torch.nan):
        held = [
            torch.where(off, part + junk, part)
            for part in (rows.advantages, rows.reference, rows.importance)
        ]
        given = PolicyRows(rows.old, held[0], torch.where(off, 0.0, rows.weights), *held[1:])
        main_grad = torch.zeros_like(w, requires_grad=False)
        out = fused_policy_loss(
            x,
            w,
            targets,
            given,
            objective,
            main_grad=main_grad,
            factor=1.0,
            chunk=4,
            backend=backend,
        )
        (gradient,) = torch.autograd.grad(out.loss, x)
        assert torch.all(gradient[off] == 0)
        results.append((out.loss.detach(), gradient, main_grad, *out.figures.values()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][1].abs().max() > 0


# -- credits
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "torch"])
@given(
    lengths=st.lists(st.integers(1, 40), max_size=6),
    beta=st.sampled_from([0.0, 0.01]),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_credits_equal_fp64(backend: Any, lengths: list[int], beta: float, seed: int) -> None:
    """Also if some tokens are not trained, whatever their log-probs are."""
    rng = np.random.default_rng(seed)
    advantages, old, reference = rng.normal(size=(3, sum(lengths))).astype(np.float32)
    weights = (
        rng.random(sum(lengths)) * (rng.random(sum(lengths)) < (0.7 if seed % 2 else 1.0))
    ).astype(np.float32)
    reference[weights == 0] = -np.inf
    device = [torch.from_numpy(each).to(DEVICE) for each in (advantages, weights, old, reference)]
    got = token_credits(*device[:2], lengths, *device[2:], beta=beta, backend=backend)
    want, start = np.zeros(sum(lengths)), 0
    for length in lengths:
        for t in range(start, start + length):
            later = [u for u in range(t, start + length) if weights[u] > 0]
            want[t] = advantages[t] - beta * sum(float(old[u]) - float(reference[u]) for u in later)
        start += length
    assert np.abs(got.advantages.cpu().numpy() - want).max(initial=0.0) <= 1e-6
    assert got.sums.dtype == torch.float64
    counted = want[weights > 0]
    assert got.sums.tolist() == pytest.approx(
        [counted.sum(), (counted**2).sum(), len(counted)], abs=1e-5
    )


def test_shipped_credit_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_credits, "BLOCK", 1024)
    lengths = [1500, 1, 1024, 2049]
    generator = torch.Generator().manual_seed(0)
    advantages, weights, old, reference = torch.randn(4, sum(lengths), generator=generator).to(
        DEVICE
    )
    given = (advantages, weights.clamp(min=0), lengths, old, reference)
    mine, twin = (token_credits(*given, beta=0.1, backend=b) for b in ("triton", "torch"))
    assert largest(mine.advantages, twin.advantages) <= 1e-6
    assert mine.sums.tolist() == pytest.approx(twin.sums.tolist(), rel=1e-6)
