"""Times the log-prob head against other heads: forward, forward with backward, peak memory, and
their errors.

    python tools/bench/heads.py
        # one GPU, under 8 minutes: the largest shapes come first
    python tools/bench/heads.py --json heads.json
    python tools/bench/heads.py --device cpu --quick
        # proves that it starts; the figures mean nothing

Every head gives the summed log-prob loss of T tokens and its gradients by hidden [T, H] and weight
[V / TP, H] (a tensor-parallel shard's shape, on one card). `fused` is `fused_policy_loss` with
advantages that make it the same loss, `head` is `linear_logprob`. Times are medians. "of GEMMs" is
the time over that of the products alone (one for forward, three for both) as the same card does
them in the same run. Extra memory is the peak beyond inputs, less the weight's gradient, which
every head must put somewhere. Errors are against fp64 over a few rows: the largest of the log-probs
if a head gives them, and the gradient of hidden by its norm.

Peers are measured if they import: Liger (liger-kernel), verl, cut-cross-entropy. What is missing is
named.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from megatron_efr.algorithms import Objective
from megatron_efr.kernels import PolicyRows, choose_backend, fused_policy_loss, linear_logprob

MODELS = {  # hidden, vocabulary
    "R1-Distill 7B": (3584, 152064),
    "R1-Distill 32B": (5120, 152064),
    "Llama 8B": (4096, 128256),
    "R1-Distill 1.5B": (1536, 151936),
}
TOKENS, SHARDS = (32768, 16384, 4096), (1, 4, 8)
CHUNK, LARGE_CHUNK = 2048, 8192  # tokens; fp32 logits of 1.2 and 5 GB at V = 152k
CHECKED = 16  # rows compared with fp64
SECONDS = 450.0

Head = Callable[["Problem"], tuple[torch.Tensor, torch.Tensor | None]]
"""Gives the summed loss and, if it has them, log-probs [T]."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One problem's size: tokens, hidden, and this shard's rows of the vocabulary."""

    model: str
    tokens: int
    hidden: int
    vocab: int
    shards: int


@dataclass(slots=True)
class Problem:
    """Inputs on the device, and a weight gradient for the head that writes its own."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    old: torch.Tensor
    main_grad: torch.Tensor


@dataclass(frozen=True, slots=True)
class Row:
    """The cost of one head for one shape; seconds, bytes. `note` if it could not be measured."""

    shape: Shape
    head: str
    forward: float | None = None
    both: float | None = None
    extra_bytes: int | None = None
    forward_of_gemms: float | None = None
    both_of_gemms: float | None = None
    logprob_error: float | None = None
    gradient_error: float | None = None
    note: str = ""


# -- heads
# --------------------------------------------------------------------------------------------------


def ours(backend: Any, chunk: int) -> Head:
    def head(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, _ = linear_logprob(p.hidden, p.weight, p.targets, chunk=chunk, backend=backend)
        return -logprobs.sum(), logprobs

    return head


def fused(backend: Any, chunk: int) -> Head:
    """With ratio 1 and advantage 1 its gradient is that of the summed loss."""

    def head(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        one = torch.ones_like(p.old)
        out = fused_policy_loss(
            p.hidden, p.weight, p.targets, PolicyRows(p.old, one, one), Objective(),
            main_grad=p.main_grad, factor=1.0, chunk=chunk, backend=backend,
        )  # fmt: skip
        return out.loss, out.logprobs

    return head


def materialised(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (p.hidden @ p.weight.t()).float()
    logprobs = torch.log_softmax(logits, -1).gather(1, p.targets[:, None])[:, 0]
    return -logprobs.sum(), logprobs


def _chunk_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")


def chunked(loss: Callable[..., torch.Tensor]) -> Head:
    """Chunks of tokens, each made again in its backward pass."""

    def head(p: Problem) -> tuple[torch.Tensor, None]:
        parts = zip(p.hidden.split(CHUNK), p.targets.split(CHUNK), strict=True)
        losses: list[Any] = [
            checkpoint(loss, h, p.weight, t, use_reentrant=False) for h, t in parts
        ]
        return torch.stack(losses).sum(), None

    return head


def liger() -> Head:
    loss: Any = importlib.import_module(
        "liger_kernel.transformers"
    ).LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda p: (loss(p.weight, p.hidden, p.targets), None)


def verl() -> Head:
    apply: Any = importlib.import_module(
        "verl.utils.kernel.linear_cross_entropy"
    ).linear_cross_entropy

    def head(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = apply(p.hidden, p.weight, p.targets, 1.0, "none")[0]
        return -logprobs.sum(), logprobs

    return head


def cut_cross_entropy() -> Head:
    apply: Any = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda p: (apply(p.hidden, p.weight, p.targets, filter_eps=None, reduction="sum"), None)


def heads(device: str) -> tuple[dict[str, Head], list[str]]:
    """Those that can be measured here, by name, and a sentence for each that cannot."""
    backend, reason = choose_backend("auto")
    # ours in each form, and the two that torch offers without a kernel
    found: dict[str, Head] = {
        f"fused ({backend})": fused(backend, CHUNK),
        f"fused ({backend}, chunk {LARGE_CHUNK})": fused(backend, LARGE_CHUNK),
        f"head ({backend})": ours(backend, CHUNK),
        "head (torch)": ours("torch", CHUNK),
        "torch materialised": materialised,
        "torch chunked": chunked(_chunk_loss),
    }
    missing = [] if backend == "triton" else [f"our Triton kernels: not measured ({reason})"]
    # the others' kernels run on a GPU alone
    if device != "cuda":
        return found, [
            *missing,
            "torch compiled, Liger, verl, cut-cross-entropy: not measured, they want a GPU",
        ]
    # peers as they are installed; one that is missing is named, not passed over
    found["torch compiled"] = chunked(torch.compile(_chunk_loss))
    for name, make in {
        "Liger": liger,
        "verl": verl,
        "cut-cross-entropy": cut_cross_entropy,
    }.items():
        try:
            found[name] = make()
        except (ImportError, AttributeError) as error:
            missing.append(f"{name}: not measured ({error})")
    return found, missing


# -- measuring
# --------------------------------------------------------------------------------------------------


def problem(shape: Shape, device: str, dtype: torch.dtype) -> Problem:
    generator = torch.Generator(device).manual_seed(0)
    options: Any = {"device": device, "dtype": dtype, "generator": generator}
    hidden = torch.randn(shape.tokens, shape.hidden, **options).requires_grad_()
    weight = (
        torch.randn(shape.vocab, shape.hidden, **options)
        .mul_(2.0 / shape.hidden**0.5)
        .requires_grad_()
    )
    targets = torch.randint(shape.vocab, (shape.tokens,), device=device, generator=generator)
    with torch.no_grad():
        old = linear_logprob(
            hidden, weight, targets, chunk=CHUNK, backend=choose_backend("auto")[0]
        )[0]
    return Problem(
        hidden,
        weight,
        targets,
        old,
        torch.zeros_like(weight, dtype=torch.float32, requires_grad=False),
    )


def timed(work: Callable[[], Any], device: str, turns: int) -> float:
    """Median seconds of one call, after one that does not count."""
    seconds = []
    for _ in range(turns + 1):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def gemm_seconds(p: Problem, device: str, turns: int) -> float:
    """One product of hidden and weight, all tokens, in chunks into one buffer of the operands' own
    type.
    """
    hidden, weight = p.hidden.detach(), p.weight.detach()
    out = torch.empty(min(CHUNK, len(hidden)), len(weight), device=device, dtype=hidden.dtype)

    def work() -> None:
        for part in hidden.split(CHUNK):
            torch.mm(part, weight.t(), out=out[: len(part)])

    return timed(work, device, turns)


def copy_rate(device: str, quick: bool) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.zeros(2**20 if quick else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / timed(lambda: target.copy_(source), device, 3)


def measure(
    shape: Shape, name: str, head: Head, p: Problem, gemm: float, device: str, turns: int
) -> Row:
    """One head on one problem. What it raises becomes the row's note: memory may not suffice, a
    peer may refuse.
    """
    row = Row(shape, name)
    try:
        # the forward pass alone is what old and reference log-probs cost
        def forward() -> None:
            with torch.no_grad():
                head(p)

        def both() -> tuple[torch.Tensor | None, torch.Tensor]:
            p.hidden.grad = p.weight.grad = None
            loss, logprobs = head(p)
            loss.backward()
            assert p.hidden.grad is not None
            return logprobs, p.hidden.grad

        # times, then peak memory beyond the inputs and the weight's gradient
        row = replace(row, forward=timed(forward, device, turns), both=timed(both, device, turns))
        p.hidden.grad = p.weight.grad = None
        extra, before = None, 0
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        logprobs, gradient = both()
        # the weight's gradient is a result, which every head has to leave
        if device == "cuda":
            own = 0 if p.weight.grad is None else p.weight.grad.nbytes
            extra = torch.cuda.max_memory_allocated() - before - own
        # errors against fp64
        logprob_error, gradient_error = errors(p, logprobs, gradient)
        assert row.forward is not None
        assert row.both is not None
        # in units of bare products: one for the forward pass, three with the backward
        return replace(
            row, extra_bytes=extra, forward_of_gemms=row.forward / gemm,
            both_of_gemms=row.both / (3 * gemm),
            logprob_error=logprob_error, gradient_error=gradient_error,
        )  # fmt: skip
    except Exception as error:
        return replace(row, note=f"{type(error).__name__}: {str(error).split(chr(10), 1)[0][:120]}")
    finally:
        p.hidden.grad = p.weight.grad = None
        if device == "cuda":
            torch.cuda.empty_cache()


def errors(
    p: Problem, logprobs: torch.Tensor | None, gradient: torch.Tensor
) -> tuple[float | None, float]:
    """Against fp64 over the first rows."""
    with torch.no_grad():
        weight = p.weight.double()
        log_probs = torch.log_softmax(p.hidden[:CHECKED].double() @ weight.t(), -1)
        targets = p.targets[:CHECKED, None]
        exact = log_probs.gather(1, targets)[:, 0]
        d_logits = log_probs.exp().scatter_add_(1, targets, torch.full_like(exact, -1.0)[:, None])
        d_hidden = d_logits @ weight
        wrong = (
            None if logprobs is None else float((logprobs[:CHECKED].double() - exact).abs().max())
        )
        return wrong, float((gradient[:CHECKED].double() - d_hidden).norm() / d_hidden.norm())


def shapes(quick: bool) -> Iterator[Shape]:
    """The headline first, whole heads before shards."""
    if quick:
        yield Shape("tiny", 96, 32, 200, 1)
        return
    for shards in SHARDS:
        for model, (hidden, vocab) in MODELS.items():
            for tokens in TOKENS:
                yield Shape(model, tokens, hidden, vocab // shards, shards)


def run(device: str, quick: bool, limit_s: float) -> dict[str, Any]:
    """Every row until the time is up, and the facts that they are read against."""
    began = time.perf_counter()
    dtype, turns = (torch.bfloat16, 3) if device == "cuda" else (torch.float32, 1)
    # every head on every shape, until the time is up
    found, notes = heads(device)
    rows: list[Row] = []
    rates: dict[str, float] = {}
    for shape in shapes(quick):
        if time.perf_counter() - began > limit_s:
            notes.append(
                f"not measured, the time was up: {shape.model}, T {shape.tokens}, shard "
                f"1/{shape.shards}, and on"
            )
            break
        # the bare matrix product is the time that no head can be below
        p = problem(shape, device, dtype)
        gemm = gemm_seconds(p, device, turns)
        rates[label(shape)] = 2.0 * p.hidden.numel() * shape.vocab / gemm
        rows += [measure(shape, name, head, p, gemm, device, turns) for name, head in found.items()]
        # the next shape wants the memory
        del p
    # facts that times are read against
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {
        "device": name,
        "torch": torch.__version__,
        "dtype": str(dtype),
        "copy_bytes_per_s": copy_rate(device, quick),
        "gemm_flop_per_s": rates,
        "notes": notes,
        "rows": [asdict(row) for row in rows],
    }


# -- saying it
# --------------------------------------------------------------------------------------------------


def label(shape: Shape) -> str:
    return f"{shape.model}, T {shape.tokens}, 1/{shape.shards}"


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| shape | head | forward, ms | of GEMMs | + backward, ms | of GEMMs | extra, GB | "
        "log-prob error | gradient error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        place = label(Shape(**row["shape"]))
        if row["note"]:
            lines.append(f"| {place} | {row['head']} | {row['note']} |||||||")
            continue
        extra = None if row["extra_bytes"] is None else row["extra_bytes"] / 1e9
        cells = (
            _cell(row["forward"] * 1e3, ".1f"), _cell(row["forward_of_gemms"], ".2f"),
            _cell(row["both"] * 1e3, ".1f"),
            _cell(row["both_of_gemms"], ".2f"), _cell(extra, ".2f"),
            _cell(row["logprob_error"], ".1e"),
            _cell(row["gradient_error"], ".1e"),
        )  # fmt: skip
        lines.append(f"| {place} | {row['head']} | {' | '.join(cells)} |")
    best, copies = max(result["gemm_flop_per_s"].values()) / 1e12, result["copy_bytes_per_s"] / 1e9
    rates = (
        f"{result['device']}, {result['dtype']}: products at up to {best:.3g} TFLOP/s, copies at "
        f"{copies:.4g} GB/s"
    )
    return "\n".join([rates, "", *lines, "", *result["notes"]]).rstrip()


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="one tiny shape")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="no shape is begun after as many"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "there is no CUDA device; `--device cpu --quick` shows that the program starts"
        )
    if given.device == "cpu" and not given.quick:
        raise SystemExit("on a CPU only --quick is measured: the shapes are a card's")
    result = run(given.device, given.quick, given.seconds)
    print(table(result))
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
