"""Every algorithm's advantages, loss and gradients against fp64 written out from its formulas, and
worked numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from megatron_efr import algorithms, methods
from megatron_efr.algorithms import Algorithm, Objective
from megatron_efr.config import AlgorithmConfig, RolloutConfig
from megatron_efr.policy.credits import fill_advantages
from megatron_efr.policy.head import Head, HeadRows
from megatron_efr.policy.logprob_check import fill_importance
from megatron_efr.policy.loss import policy_loss
from megatron_efr.policy.packing import pack, row_weights, samples
from megatron_efr.samples import PackedBatch
from megatron_efr.types import Grade, Graded, Group, Prompt, Response, Rewarded
from tests.groups import KNOWN

VECTORS = json.loads((Path(__file__).parents[2] / "data" / "algorithm_vectors.json").read_text())
CORRECT, LENGTHS = np.array([1.0, 0.0, 1.0, 1.0]), np.array([300, 900, 500, 120])
LIMIT = 1000
CPU = torch.device("cpu")


def build(name: str = "rloo", samples: int = 4, limit: int = LIMIT, **options: Any) -> Algorithm:
    config = AlgorithmConfig.model_validate({"name": name, **options})
    return algorithms.build(config, RolloutConfig(samples=samples, max_new_tokens=limit))


def objective(algorithm: Algorithm, limit: int = LIMIT) -> Objective:
    return algorithm.objective(RolloutConfig(max_new_tokens=limit))


def token_advantages(
    algorithm: Algorithm, groups: list[np.ndarray], lengths: list[np.ndarray]
) -> list[np.ndarray]:
    """Per response the one value that its tokens have, without a KL."""
    made = algorithm.credits(groups, lengths, LIMIT)
    sizes = [int(length) for each in lengths for length in each]
    empty = torch.empty(0)
    zeros = torch.zeros(sum(sizes))
    batch = PackedBatch(
        tokens=empty, positions=empty, lengths=sizes, cu_seqlens=empty, rows=empty, targets=empty,
        row_lengths=sizes,
        indices=list(range(len(sizes))),
        columns={
            "advantage": torch.tensor(np.concatenate(made),
                dtype=torch.float32).repeat_interleave(torch.tensor(sizes)),
            "weight": zeros + 1, "old_logprob": zeros, "reference_logprob": zeros,
        },
    )  # fmt: skip
    fill_advantages([batch], objective(algorithm), lambda t: t)
    firsts = [float(part[0]) for part in batch.columns["advantage"].split(sizes)]
    return np.split(np.array(firsts), np.cumsum([len(each) for each in lengths])[:-1])


# -- whole updates against fp64
# ----------------------------------------------------------------------------------------

VOCAB, HIDDEN, SAMPLES = 37, 12, 4


class Given(NamedTuple):
    """Everything a loss is made from, fp64, sequence by sequence; `logprobs` and `entropies` carry
    gradients.
    """

    rewards: np.ndarray  # [groups, samples]
    logprobs: list[torch.Tensor]
    old: list[torch.Tensor]
    reference: list[torch.Tensor]
    importance: list[torch.Tensor]
    entropies: list[torch.Tensor]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(each) for each in self.old]).reshape(self.rewards.shape)


def per_token(given: Given, advantages: np.ndarray) -> list[torch.Tensor]:
    return [
        torch.full_like(old, float(a))
        for old, a in zip(given.old, advantages.flatten(), strict=True)
    ]


def less_kl_to_go(given: Given, advantages: list[torch.Tensor], beta: float) -> list[torch.Tensor]:
    made = []
    for a, old, reference in zip(advantages, given.old, given.reference, strict=True):
        ratios = (old - reference).tolist()
        made.append(
            a
            - beta
            * torch.tensor([sum(ratios[t:]) for t in range(len(ratios))], dtype=torch.float64)
        )
    return made


def whiten(
    advantages: list[torch.Tensor], unbiased: bool, guard: Callable[[float], float]
) -> list[torch.Tensor]:
    flat = torch.cat(advantages)
    scale = guard(float(flat.var(unbiased=unbiased))) ** 0.5
    return [(a - flat.mean()) / scale for a in advantages]


def others_mean(rewards: np.ndarray) -> np.ndarray:
    return np.array(
        [[row[i] - np.delete(row, i).mean() for i in range(len(row))] for row in rewards]
    )


def group_z(rewards: np.ndarray) -> np.ndarray:
    return np.array([[(r - row.mean()) / (row.std(ddof=1) + 1e-6) for r in row] for row in rewards])


def ppo(
    given: Given, advantages: list[torch.Tensor], low: float, high: float
) -> list[torch.Tensor]:
    ratios = [(new - old).exp() for new, old in zip(given.logprobs, given.old, strict=True)]
    return [
        -torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a)
        for r, a in zip(ratios, advantages, strict=True)
    ]


def sequence_mean(losses: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([each.mean() for each in losses]).mean()


def token_mean(losses: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(losses).mean()


def k3(given: Given) -> list[torch.Tensor]:
    pairs = zip(given.reference, given.logprobs, strict=True)
    return [(ref - new).exp() - 1 - (ref - new) for ref, new in pairs]


def exact_rloo(given: Given) -> torch.Tensor:
    advantages = less_kl_to_go(given, per_token(given, others_mean(given.rewards)), 1e-3)
    return sequence_mean(ppo(given, advantages, 0.2, 0.2))


def exact_released_code(given: Given) -> torch.Tensor:
    advantages = less_kl_to_go(given, per_token(given, others_mean(given.rewards)), 1e-3)
    return sequence_mean(ppo(given, whiten(advantages, False, lambda v: max(v, 1e-8)), 0.2, 0.2))


def exact_grpo(given: Given) -> torch.Tensor:
    losses = ppo(given, per_token(given, group_z(given.rewards)), 0.2, 0.2)
    return sequence_mean([loss + 0.04 * kl for loss, kl in zip(losses, k3(given), strict=True)])


def exact_verl_grpo(given: Given) -> torch.Tensor:
    """Token mean, dual clip, entropy bonus, truncated importance."""
    losses = []
    for a, plain, new, old, rho, entropy in zip(
        per_token(given, group_z(given.rewards)),
        ppo(given, per_token(given, group_z(given.rewards)), 0.2, 0.2),
        given.logprobs, given.old, given.importance, given.entropies, strict=True,
    ):  # fmt: skip
        bounded = torch.where(a < 0, torch.minimum(plain, -1.5 * a), plain)
        assert new.shape == old.shape
        losses.append(rho.clamp(max=1.2) * bounded - 0.01 * entropy)
    return token_mean(losses)


def exact_dr_grpo(given: Given) -> torch.Tensor:
    centred = given.rewards - given.rewards.mean(1, keepdims=True)
    return torch.stack(
        [each.sum() / 40 for each in ppo(given, per_token(given, centred), 0.2, 0.2)]
    ).mean()


def exact_reinforce(given: Given) -> torch.Tensor:
    advantages = less_kl_to_go(given, per_token(given, given.rewards), 1e-3)
    return token_mean(ppo(given, whiten(advantages, True, lambda v: v + 1e-8), 0.2, 0.2))


def exact_reinforce_baseline(given: Given) -> torch.Tensor:
    centred = given.rewards - given.rewards.mean(1, keepdims=True)
    losses = ppo(given, whiten(per_token(given, centred), True, lambda v: v + 1e-8), 0.2, 0.2)
    kls = [(ref - new) ** 2 / 2 for ref, new in zip(given.reference, given.logprobs, strict=True)]
    return token_mean([loss + 1e-3 * kl for loss, kl in zip(losses, kls, strict=True)])


def exact_dapo(given: Given) -> torch.Tensor:
    penalty = np.array(
        [[min(max((n - 32) / 8, 0.0), 1.0) for n in row] for row in given.lengths]
    )  # limit 40, its fifth
    return token_mean(ppo(given, per_token(given, group_z(given.rewards - penalty)), 0.2, 0.28))


def exact_gspo(given: Given) -> torch.Tensor:
    losses = []
    for new, old, a in zip(
        given.logprobs, given.old, group_z(given.rewards).flatten(), strict=True
    ):
        ratio = (new - old).mean().exp()
        losses.append(-torch.minimum(ratio * a, ratio.clamp(1 - 3e-4, 1 + 4e-4) * a))
    return torch.stack(losses).mean()


def exact_wide_gspo(given: Given) -> torch.Tensor:
    """So that not everything is clipped, with a k3 and an entropy bonus."""
    losses = []
    for new, old, a, kl, entropy in zip(
        given.logprobs,
        given.old,
        group_z(given.rewards).flatten(),
        k3(given),
        given.entropies,
        strict=True,
    ):
        ratio = (new - old).mean().exp()
        clipped = -torch.minimum(ratio * a, ratio.clamp(0.95, 1.05) * a)
        losses.append(clipped + 0.1 * kl.mean() - 0.01 * entropy.mean())
    return torch.stack(losses).mean()


def exact_cispo(given: Given) -> torch.Tensor:
    losses = []
    for new, old, a in zip(
        given.logprobs, given.old, group_z(given.rewards).flatten(), strict=True
    ):
        losses.append(-(new - old).exp().clamp(max=1.28).detach() * a * new)
    return token_mean(losses)


def exact_opo(given: Given) -> torch.Tensor:
    baseline = (given.rewards * given.lengths).sum(1) / given.lengths.sum(1)
    return token_mean(ppo(given, per_token(given, given.rewards - baseline[:, None]), 0.2, 0.2))


def exact_likelihood(given: Given) -> torch.Tensor:
    return sequence_mean(
        [-r * new for r, new in zip(given.rewards.flatten(), given.logprobs, strict=True)]
    )


def exact_filtered_sft(given: Given) -> torch.Tensor:
    pairs = zip(given.rewards.flatten(), given.logprobs, strict=True)
    return sequence_mean([-new for reward, new in pairs if reward > 0])


def exact_filtered_tokens(given: Given) -> torch.Tensor:
    pairs = zip(given.rewards.flatten(), given.logprobs, strict=True)
    return token_mean([-new for reward, new in pairs if reward > 0.1])


def exact_filtered_with_negatives(given: Given) -> torch.Tensor:
    pairs = zip(given.rewards.flatten(), given.logprobs, strict=True)
    return sequence_mean([-new if reward > 0 else 0.25 * new for reward, new in pairs])


def drawn(seed: int) -> list[Rewarded]:
    """Three prompts' rewarded groups of very different lengths, with engine log-probs."""
    rng = np.random.default_rng(seed)
    groups = []
    for number in range(3):
        lengths = rng.integers(1, 40, SAMPLES)
        responses = tuple(
            Response(
                tuple(rng.integers(0, VOCAB, n).tolist()),
                (-1 - rng.random(n)).astype(np.float32),
                "length" if n > 35 else "stop",
            )
            for n in lengths
        )
        rewards = (rng.random(SAMPLES) < 0.5) * rng.random(SAMPLES)
        graded = Graded(
            Group(Prompt(str(number), (1, 2, 3), "", ""), responses), (Grade("wrong"),) * SAMPLES
        )
        groups.append(Rewarded(graded, rewards))
    return groups


def fields(batch: PackedBatch, generator: torch.Generator, made: Objective) -> None:
    """Log-probs around the engine's, and what follows from them."""
    noise = torch.randn(2, len(batch.targets), generator=generator)
    batch.columns["old_logprob"] = batch.columns["engine_logprob"] + 0.2 * noise[0]
    batch.columns["reference_logprob"] = batch.columns["old_logprob"] + 0.3 * noise[1]
    fill_importance([batch], made.importance)


WIDE = {"clip_low": 0.05, "clip_high": 0.05, "kl": "k3", "beta": 0.1, "entropy_bonus": 0.01}


@pytest.mark.parametrize(
    ("name", "options", "exact"),
    [
        ("rloo", {}, exact_rloo),
        ("rloo", {"normalize": "tokens"}, exact_released_code),
        ("grpo", {}, exact_grpo),
        (
            "grpo",
            {"kl": "none", "beta": 0.04, "aggregate": "token", "dual_clip": 1.5,
                "entropy_bonus": 0.01,
             "importance": "truncate", "importance_cap": 1.2},
            exact_verl_grpo,
        ),
        ("dr_grpo", {}, exact_dr_grpo),
        ("reinforce_plus_plus", {}, exact_reinforce),
        ("reinforce_plus_plus_baseline", {}, exact_reinforce_baseline),
        ("dapo", {}, exact_dapo),
        ("gspo", {}, exact_gspo),
        ("gspo", WIDE, exact_wide_gspo),
        ("cispo", {}, exact_cispo),
        ("opo", {}, exact_opo),
        ("likelihood", {}, exact_likelihood),
        ("filtered_sft", {}, exact_filtered_sft),
        ("filtered_sft", {"aggregate": "token", "above": 0.1}, exact_filtered_tokens),
        ("filtered_sft_negatives", {"negative": 0.25}, exact_filtered_with_negatives),
    ],
)  # fmt: skip
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradients_equal_fp64(
    name: str, options: dict[str, Any], exact: Callable[[Given], torch.Tensor], seed: int
) -> None:
    algorithm = build(name, limit=40, **options)
    made = objective(algorithm, limit=40)
    groups = methods.credit(methods.Method(), algorithm, drawn(seed), KNOWN._replace(limit=40))
    sequences = samples(groups)
    everyone = list(range(len(sequences)))
    weights = row_weights([s.size for s in sequences], everyone, made.aggregate, made.divisor)
    batches = [pack(sequences, part, weights, CPU) for part in (everyone[::2], everyone[1::2])]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(VOCAB, HIDDEN))
    states = [torch.randn(len(batch.targets), HIDDEN, requires_grad=True) for batch in batches]
    for batch, state in zip(batches, states, strict=True):
        fields(batch, generator, made)
        with torch.no_grad():  # around the current log-probs, so that not all is clipped
            now = torch.log_softmax(state @ weight.t(), -1).gather(1, batch.targets[:, None])[:, 0]
            shift = now + 0.25 * torch.randn(now.shape) - batch.columns["old_logprob"]
            batch.columns["old_logprob"] += shift
            batch.columns["reference_logprob"] += shift
    fill_advantages(batches, made, lambda t: t)
    head = Head(weight, VOCAB, 1.0, None, sequence_parallel=False, chunk=16, backend="torch")
    values = [
        policy_loss(made)(HeadRows(head, s, b, 1.0))[0]
        for s, b in zip(states, batches, strict=True)
    ]
    torch.stack(values).sum().backward()

    wide = weight.detach().double().requires_grad_()
    wide_states = [state.detach().double().requires_grad_() for state in states]
    found: dict[int, tuple[torch.Tensor, ...]] = {}
    for batch, state in zip(batches, wide_states, strict=True):
        log_probs = torch.log_softmax(state @ wide.t(), -1)
        rho = batch.columns.get("importance", torch.ones(len(batch.targets)))
        columns = [
            log_probs.gather(1, batch.targets[:, None])[:, 0],
            batch.columns["old_logprob"], batch.columns["reference_logprob"], rho,
            -(log_probs.exp() * log_probs).sum(-1),
        ]  # fmt: skip
        parts = zip(*(c.double().split(batch.row_lengths) for c in columns), strict=True)
        found |= dict(zip(batch.indices, parts, strict=True))
    rewards = np.array([group.rewarded.rewards for group in groups])
    given = Given(
        rewards, *(list(column) for column in zip(*(found[i] for i in everyone), strict=True))
    )
    want = exact(given)
    want.backward()
    assert float(sum(values).detach()) == pytest.approx(float(want.detach()), rel=1e-5, abs=1e-6)
    for mine, theirs in [(weight, wide), *zip(states, wide_states, strict=True)]:
        assert mine.grad is not None
        assert theirs.grad is not None
        assert float(theirs.grad.norm()) > 0
        assert float((mine.grad - theirs.grad).norm() / theirs.grad.norm()) <= 1e-5
