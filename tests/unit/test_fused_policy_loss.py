"""The one-sweep policy loss in plain torch: policy/loss.py's numbers, the promise it makes, the work it leaves out."""

from __future__ import annotations

import importlib

import pytest
import torch

from megatron_efr.kernels import PolicyRows, PolicyTerms, fused_policy_loss, linear_logprob, products
from megatron_efr.kernels.rows import live_spans
from megatron_efr.policy.loss import clipped_policy_loss
from megatron_efr.types import PackedBatch

T, H, V = 23, 8, 30


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PolicyRows]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, H, generator=generator).to(dtype).requires_grad_()
    w = torch.randn(V, H, generator=generator).mul_(0.5).to(dtype).requires_grad_()
    targets = torch.arange(T) % V
    noise = torch.randn(3, T, generator=generator)
    logprob = linear_logprob(x, w, targets)[0].detach()
    return x, w, targets, PolicyRows(logprob + 0.3 * noise[0], noise[1], noise[2].abs() / T)


def packed(rows: PolicyRows) -> PackedBatch:
    nothing = torch.zeros(0, dtype=torch.int64)
    return PackedBatch(
        nothing, nothing, [], nothing, nothing, nothing, [], [], rows.weights, rows.old, None, rows.advantages
    )


def test_equals_the_loss_that_the_policy_uses() -> None:
    x, w, targets, rows = inputs()
    main_grad = torch.zeros(V, H)
    out = fused_policy_loss(x, w, targets, rows, PolicyTerms(0.2), main_grad=main_grad, factor=1.0, chunk=5)
    value, metrics = clipped_policy_loss(0.2)(linear_logprob(x, w, targets, chunk=5)[0], packed(rows))
    d_hidden, d_weight = torch.autograd.grad(value, [x, w])
    assert out.figures.keys() == metrics.keys()
    assert all(float((out.figures[name] - metrics[name]).abs()) <= 1e-6 for name in metrics)
    assert (torch.autograd.grad(out.loss, x)[0] - d_hidden).norm() <= 1e-6 * d_hidden.norm()
    assert (main_grad - d_weight).norm() <= 1e-6 * d_weight.norm()


def test_finite_differences() -> None:
    x, w, targets, rows = inputs()
    rows = PolicyRows(rows.old, rows.advantages, rows.weights, rows.old.flip(0))
    terms, step = PolicyTerms(0.95, "k3", 0.3, 0.1), 1e-2  # a clip so wide that no step crosses its kink
    direction = torch.randn(T, H, generator=torch.Generator().manual_seed(5))

    def loss(at: torch.Tensor) -> torch.Tensor:
        return fused_policy_loss(at, w, targets, rows, terms, main_grad=torch.zeros(V, H), factor=1.0).loss

    with torch.no_grad():
        slope = float(loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    along = float((torch.autograd.grad(loss(x), x)[0] * direction).sum())
    assert along == pytest.approx(slope, rel=2e-3)


@pytest.mark.parametrize("arrives", [1.0, 2.0 * (1 + 1e-4), float("nan")])
def test_another_factor_than_promised_is_an_error(arrives: float) -> None:
    x, w, targets, rows = inputs()
    out = fused_policy_loss(x, w, targets, rows, PolicyTerms(0.2), main_grad=torch.zeros(V, H), factor=2.0)
    with pytest.raises(RuntimeError, match=r"written for a factor of 2\.0"):
        (out.loss * arrives).backward()


def test_the_factor_scales_both_gradients() -> None:
    results = []
    for factor in (1.0, 1024.0):
        x, w, targets, rows = inputs()
        main_grad = torch.zeros(V, H)
        out = fused_policy_loss(x, w, targets, rows, PolicyTerms(0.2), main_grad=main_grad, factor=factor)
        (out.loss * factor).backward()
        assert w.grad is None, "main_grad has it"
        results.append((x.grad, main_grad))
    assert torch.equal(results[0][0] * 1024, results[1][0])
    assert torch.equal(results[0][1] * 1024, results[1][1])


def test_nothing_is_written_without_gradients() -> None:
    x, w, targets, rows = inputs()
    main_grad = torch.zeros(V, H)
    with torch.no_grad():
        out = fused_policy_loss(x, w, targets, rows, PolicyTerms(0.2), main_grad=main_grad, factor=1.0)
    assert not out.loss.requires_grad
    assert torch.all(main_grad == 0)


def test_refusals() -> None:
    x, w, targets, rows = inputs()
    plain = PolicyTerms(0.2)
    for main_grad in (torch.zeros(V, H, dtype=torch.bfloat16), torch.zeros(V, H + 1)):
        with pytest.raises(ValueError, match="adds to an fp32"):
            fused_policy_loss(x, w, targets, rows, plain, main_grad=main_grad, factor=1.0)
    for terms, words in ((PolicyTerms(0.2, "k3", 0.1), "reference's"), (PolicyTerms(0.2, cap=2.0), "engine's")):
        with pytest.raises(ValueError, match=words):
            fused_policy_loss(x, w, targets, rows, terms, main_grad=torch.zeros(V, H), factor=1.0)


def test_sequences_without_advantage_skip_their_products(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, targets, rows = inputs()
    advantages = rows.advantages.clone()
    advantages[:12] = 0.0
    advantages[18:] = 0.0
    rows = PolicyRows(rows.old, advantages, rows.weights, rows.old)
    multiplied: list[int] = []
    real = products.accumulate_weight_gradient

    def counted(total: torch.Tensor, d_logits: torch.Tensor, hidden: torch.Tensor) -> None:
        multiplied.append(len(hidden))
        real(total, d_logits, hidden)

    for name in ("linear_logprob", "fused_policy_loss"):  # modules that share their function's name
        module = importlib.import_module(f"megatron_efr.kernels.{name}")
        monkeypatch.setattr(module, "accumulate_weight_gradient", counted)
    main_grad = torch.zeros(V, H)
    out = fused_policy_loss(x, w, targets, rows, PolicyTerms(0.2), main_grad=main_grad, factor=1.0, chunk=5)
    got = torch.autograd.grad(out.loss, x)[0]
    assert sum(multiplied) <= 6, multiplied
    multiplied.clear()
    value, _ = clipped_policy_loss(0.2)(linear_logprob(x, w, targets, chunk=5)[0], packed(rows))
    d_hidden, d_weight = torch.autograd.grad(value, [x, w])
    assert sum(multiplied) <= 6, "the recomputing path skips them too"
    assert (got - d_hidden).norm() <= 1e-6 * d_hidden.norm()
    assert (main_grad - d_weight).norm() <= 1e-6 * d_weight.norm()
    multiplied.clear()
    fused_policy_loss(x, w, targets, rows, PolicyTerms(0.2, "k3", 0.1), main_grad=main_grad, factor=1.0, chunk=5)
    assert sum(multiplied) == T, "a KL gives every row a gradient"


def test_no_rows() -> None:
    x, w, _, _ = inputs()
    none = torch.zeros(0)
    out = fused_policy_loss(
        x[:0], w, torch.zeros(0, dtype=torch.int64), PolicyRows(none, none, none), PolicyTerms(0.2),
        main_grad=torch.zeros(V, H), factor=1.0,
    )  # fmt: skip
    out.loss.backward()
    assert float(out.loss.detach()) == float(out.figures["ratio_max"]) == 0.0


def test_live_spans() -> None:
    live = torch.tensor([0, 1, 0, 1, 0, 0, 0, 0, 1], dtype=torch.bool)
    assert live_spans(live, 4) == [slice(1, 4), slice(4, 4), slice(8, 9)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fallback_product_is_fp32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_UPCAST_ROWS", 7)
    x, w, *_ = inputs(dtype)
    x, w = x.detach(), w.detach()
    assert not products.has_fp32_products(w), "there is none on CPU"
    logits = products.logits_into(torch.empty(T, V), x, w)
    assert (logits.double() - x.double() @ w.double().t()).abs().max() <= 1e-5
    total = torch.ones(V, H)
    products.accumulate_weight_gradient(total, logits.to(dtype), x)
    assert (total.double() - 1 - logits.to(dtype).double().t() @ x.double()).abs().max() <= 1e-4
