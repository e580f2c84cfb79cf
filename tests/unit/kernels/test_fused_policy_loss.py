"""The one-sweep policy loss in plain torch: the numbers of autograd, the promise it makes, the work
it leaves out.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from megatron_efr.algorithms import Objective
from megatron_efr.kernels import PolicyRows, fused_policy_loss, linear_logprob, matmul

T, H, V = 23, 8, 30


def inputs(
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PolicyRows]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, H, generator=generator).to(dtype).requires_grad_()
    w = torch.randn(V, H, generator=generator).mul_(0.5).to(dtype).requires_grad_()
    targets = torch.arange(T) % V
    noise = torch.randn(3, T, generator=generator)
    logprob = linear_logprob(x, w, targets)[0].detach()
    return x, w, targets, PolicyRows(logprob + 0.3 * noise[0], noise[1], noise[2].abs() / T)


def by_autograd(logprobs: torch.Tensor, rows: PolicyRows, clip: float = 0.2) -> torch.Tensor:
    """PPO's clipped loss, written out."""
    ratio = (logprobs - rows.old).exp()
    a = rows.advantages
    return -(rows.weights * torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)).sum()


def test_equals_autograd_of_the_formula() -> None:
    x, w, targets, rows = inputs()
    logprobs, _ = linear_logprob(x, w, targets, chunk=5)
    value = by_autograd(logprobs, rows)
    d_hidden, d_weight = torch.autograd.grad(value, [x, w], retain_graph=True)
    main_grad = torch.zeros(V, H)
    out = fused_policy_loss(
        x, w, targets, rows, Objective(), main_grad=main_grad, factor=1.0, chunk=5
    )
    assert torch.equal(out.logprobs, logprobs)
    value = value.detach()
    assert (out.loss.detach() - value).abs() <= 1e-6
    assert (torch.autograd.grad(out.loss, x)[0] - d_hidden).norm() <= 1e-6 * d_hidden.norm()
    assert (main_grad - d_weight).norm() <= 1e-6 * d_weight.norm()
    with torch.no_grad():
        ratio = (logprobs - rows.old).exp()
        bites = ((ratio > 1.2) & (rows.advantages > 0)) | ((ratio < 0.8) & (rows.advantages < 0))
        log_probs, weights = torch.log_softmax(x @ w.t(), -1), rows.weights
        figures = {
            "loss": value, "clip_fraction": rows.weights[bites].sum(), "ratio_max": ratio.max(),
            "clip_above": weights[bites & (ratio > 1)].sum(),
            "clip_below": weights[bites & (ratio < 1)].sum(),
            "kl_to_old": (rows.weights * (rows.old - logprobs)).sum(),
            "entropy": -(rows.weights * (log_probs.exp() * log_probs).sum(-1)).sum(),
        }  # fmt: skip
    assert out.figures.keys() == figures.keys()
    assert all(float((out.figures[name] - figures[name]).abs()) <= 1e-6 for name in figures)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_main_grad_the_weight_gets_its_gradient_from_autograd(dtype: torch.dtype) -> None:
    x, w, targets, rows = inputs(dtype)
    main_grad = torch.zeros(V, H)
    fused_policy_loss(x, w, targets, rows, Objective(), main_grad=main_grad, factor=2.0, chunk=5)
    out = fused_policy_loss(x, w, targets, rows, Objective(), factor=2.0, chunk=5)
    gradient = torch.autograd.grad(out.loss * 2.0, w)[0]
    assert gradient.dtype == dtype
    assert torch.equal(gradient, main_grad.to(dtype))


def test_finite_differences() -> None:
    x, w, targets, rows = inputs()
    rows = PolicyRows(rows.old, rows.advantages, rows.weights, rows.old.flip(0))
    # a clip so wide that no step crosses its kink
    terms, step = Objective(low=0.95, high=0.95, kl="k3", beta=0.3, bonus=0.1), 1e-2
    direction = torch.randn(T, H, generator=torch.Generator().manual_seed(5))

    def loss(at: torch.Tensor) -> torch.Tensor:
        return fused_policy_loss(
            at, w, targets, rows, terms, main_grad=torch.zeros(V, H), factor=1.0
        ).loss

    with torch.no_grad():
        slope = float(loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    along = float((torch.autograd.grad(loss(x), x)[0] * direction).sum())
    assert along == pytest.approx(slope, rel=2e-3)


@pytest.mark.parametrize("arrives", [1.0, 2.0 * (1 + 1e-4), float("nan")])
def test_another_factor_than_promised_is_an_error(arrives: float) -> None:
    x, w, targets, rows = inputs()
    out = fused_policy_loss(
        x, w, targets, rows, Objective(), main_grad=torch.zeros(V, H), factor=2.0
    )
    with pytest.raises(RuntimeError, match=r"written for a factor of 2\.0"):
        (out.loss * arrives).backward()


def test_the_factor_scales_both_gradients() -> None:
    results = []
    for factor in (1.0, 1024.0):
        x, w, targets, rows = inputs()
        main_grad = torch.zeros(V, H)
        out = fused_policy_loss(
            x, w, targets, rows, Objective(), main_grad=main_grad, factor=factor
        )
        (out.loss * factor).backward()
        assert w.grad is None, "main_grad has it"
        results.append((x.grad, main_grad))
    assert torch.equal(results[0][0] * 1024, results[1][0])
    assert torch.equal(results[0][1] * 1024, results[1][1])


def test_nothing_is_written_without_gradients() -> None:
    x, w, targets, rows = inputs()
    main_grad = torch.zeros(V, H)
    with torch.no_grad():
        out = fused_policy_loss(x, w, targets, rows, Objective(), main_grad=main_grad, factor=1.0)
    assert not out.loss.requires_grad
    assert torch.all(main_grad == 0)


def test_refusals() -> None:
    x, w, targets, rows = inputs()
    plain = Objective()
    for main_grad in (torch.zeros(V, H, dtype=torch.bfloat16), torch.zeros(V, H + 1)):
        with pytest.raises(ValueError, match="adds to an fp32"):
            fused_policy_loss(x, w, targets, rows, plain, main_grad=main_grad, factor=1.0)
    for terms, words in (
        (Objective(kl="k3", beta=0.1), "reference's"),
        (Objective(ratio="sequence"), "two passes"),
    ):
        with pytest.raises(ValueError, match=words):
            fused_policy_loss(x, w, targets, rows, terms, main_grad=torch.zeros(V, H), factor=1.0)


@pytest.mark.parametrize("live", [0, 4, 5, 6, 12])
def test_rows_without_advantage_skip_their_products_exactly(
    live: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w, targets, rows = inputs()
    advantages = rows.advantages.clone()
    advantages[live:] = 0.0
    rows = PolicyRows(rows.old, advantages, rows.weights, rows.old)
    multiplied: list[int] = []
    real = matmul.accumulate_weight_gradient

    def counted(total: torch.Tensor, d_logits: torch.Tensor, hidden: torch.Tensor) -> None:
        multiplied.append(len(hidden))
        real(total, d_logits, hidden)

    # the module shares its function's name
    module = importlib.import_module("megatron_efr.kernels.fused_policy_loss")
    monkeypatch.setattr(module, "accumulate_weight_gradient", counted)

    def run(terms: Objective, live: int | None) -> list[torch.Tensor]:
        multiplied.clear()
        main_grad = torch.zeros(V, H)
        out = fused_policy_loss(
            x, w, targets, rows, terms, main_grad=main_grad, factor=1.0, chunk=5, live=live
        )  # fmt: skip
        return [
            out.loss.detach(),
            out.logprobs,
            torch.autograd.grad(out.loss, x)[0],
            main_grad,
            *out.figures.values(),
        ]

    plain = Objective()
    all_rows = run(plain, None)
    assert sum(multiplied) == T
    skipped = run(plain, live)
    assert sum(multiplied) == live, multiplied
    assert all((a - b).abs().max() <= 1e-7 for a, b in zip(all_rows, skipped, strict=True))
    assert torch.all(skipped[2][live:] == 0)
    with_kl = Objective(kl="k3", beta=0.1)
    assert all(
        torch.equal(a, b) for a, b in zip(run(with_kl, None), run(with_kl, live), strict=True)
    )
    assert sum(multiplied) == T, "a KL gives every row a gradient"


def test_no_rows() -> None:
    x, w, _, _ = inputs()
    none = torch.zeros(0)
    out = fused_policy_loss(
        x[:0], w, torch.zeros(0, dtype=torch.int64), PolicyRows(none, none, none), Objective(),
        main_grad=torch.zeros(V, H), factor=1.0,
    )  # fmt: skip
    out.loss.backward()
    assert float(out.loss.detach()) == float(out.figures["ratio_max"]) == 0.0


@pytest.mark.parametrize("processor", ["this", "one without AMX"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fallback_product_is_fp32(
    dtype: torch.dtype, processor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "_PART_ROWS", 7)
    if processor != "this":
        monkeypatch.setattr(matmul, "summed_in_float32", lambda: False)
    x, w, *_ = inputs(dtype)
    x, w = x.detach(), w.detach()
    assert not matmul.has_fp32_products(w), "there is none on CPU"
    logits = matmul.logits_into(torch.empty(T, V), x, w)
    assert (logits.double() - x.double() @ w.double().t()).abs().max() <= 1e-5
    total = torch.ones(V, H)
    matmul.accumulate_weight_gradient(total, logits.to(dtype), x)
    assert (total.double() - 1 - logits.to(dtype).double().t() @ x.double()).abs().max() <= 1e-4
