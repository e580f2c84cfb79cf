"""One rank of a tensor-parallel run of the head (started by torchrun under the interpreter),
against fp64 of the whole.

The vocabulary ends inside the last rank's rows, or before them: then that rank holds nothing but
padding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_efr.algorithms import Objective
from megatron_efr.kernels import PolicyRows, fused_policy_loss, linear_logprob, triton_rows
from tests.kernel_suite import exact, exact_policy, largest, policy_case, relative

ROWS = 12  # of the head, per rank


def check(backend: Any, vocab: int) -> None:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    group = dist.group.WORLD
    tokens = 9
    x, _, _, drawn = policy_case(tokens, 20, torch.float32)
    w = torch.randn(ROWS * ranks, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    # shards' first and last
    edges = [e for r in range(ranks) for e in (r * ROWS, r * ROWS + ROWS - 1) if e < vocab]
    targets = torch.tensor([vocab - 1, *edges] * tokens)[:tokens]
    shard = slice(rank * ROWS, (rank + 1) * ROWS)
    mine = w.detach()[shard].clone().requires_grad_()

    logprob, entropy = linear_logprob(
        x,
        mine,
        targets,
        temperature=0.8,
        true_vocab=vocab,
        tp_group=group,
        entropy=True,
        chunk=4,
        backend=backend,
    )
    want, want_entropy = exact(x, w, targets, 0.8, vocab)
    assert entropy is not None
    assert max(largest(logprob, want), largest(entropy, want_entropy)) <= 1e-5
    g = torch.linspace(-1, 1, tokens)
    got = torch.autograd.grad((logprob * g + entropy * g.flip(0)).sum(), [x, mine])
    dx, dw = torch.autograd.grad(
        (want * g.double() + want_entropy * g.flip(0).double()).sum(), [x, w]
    )
    compare(got[0], dx, got[1], dw, shard)

    near, noise = (
        want.detach().float(),
        torch.randn(3, tokens, generator=torch.Generator().manual_seed(2)) * 0.3,
    )
    rows = PolicyRows(
        near + noise[0], drawn.advantages, drawn.weights, near + noise[1], noise[2].exp()
    )
    terms = Objective(high=0.1, dual=1.3, kl="k3", beta=0.3, bonus=0.05)
    main_grad = torch.zeros_like(mine, requires_grad=False)
    out = fused_policy_loss(
        x, mine, targets, rows, terms, main_grad=main_grad, factor=2.0, temperature=0.8,
        true_vocab=vocab,
        tp_group=group, chunk=4, backend=backend,
    )  # fmt: skip
    assert torch.equal(out.logprobs, logprob)
    value = exact_policy(x, w, targets, rows, terms, vocab)
    assert largest(out.loss, value) <= 1e-5
    dx, dw = torch.autograd.grad(value * 2.0, [x, w])
    compare(torch.autograd.grad(out.loss * 2.0, x)[0], dx, main_grad, dw, shard)


def compare(
    hidden: torch.Tensor,
    exact_hidden: torch.Tensor,
    weight: torch.Tensor,
    exact_weight: torch.Tensor,
    shard: slice,
) -> None:
    """`weight` is this rank's shard of the gradient; its error counts against the whole gradient's
    norm.
    """
    assert relative(hidden, exact_hidden) <= 1e-5, (
        "the gradient of hidden is the sum over ranks, on every rank"
    )
    assert (
        weight.double() - exact_weight[shard].double()
    ).norm() <= 1e-5 * exact_weight.double().norm()
    if exact_weight[shard].abs().max() == 0:
        assert torch.all(weight == 0), "nothing but padding"


if __name__ == "__main__":
    torch.set_num_threads(1)
    triton_rows.BLOCK = 16
    dist.init_process_group("gloo")
    whole = ROWS * dist.get_world_size()
    for backend in ("torch", "triton"):
        for vocab in (whole, whole - 5, whole - ROWS):
            check(backend, vocab)
    dist.destroy_process_group()
