"""Random numbers against Random123's own vectors, and the sampler against exact probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from megatron_efr.rollout.checks import check_sampling
from megatron_efr.rollout.local.sampling import draw, philox4x32, uniforms
from megatron_efr.types import Sampling

# kat_vectors of Random123 1.14: philox4x32, 10 rounds: counter, key, result
KNOWN = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
COUNT = 200_000


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], dtype=np.uint64)


def test_philox_gives_random123s_vectors_in_one_call() -> None:
    counter, key, expected = (np.stack([words(row[i]) for row in KNOWN], axis=1) for i in range(3))
    assert (philox4x32(counter, key) == expected).all()


def test_uniforms_are_the_first_two_words_as_53_bits() -> None:
    seed = np.array([0x299F31D0A4093822], dtype=np.uint64)  # key words a4093822, 299f31d0
    key = np.array([[0xA4093822], [0x299F31D0]], dtype=np.uint64)
    drawn = philox4x32(np.array([[7], [5], [0], [0]], dtype=np.uint64), key)
    high, low = int(drawn[0, 0]) >> 5, int(drawn[1, 0]) >> 6
    expected = ((high << 26) + low) / 2**53
    assert uniforms(seed, np.array([5]), np.array([7]))[0] == expected


def test_uniforms_are_uniform_and_differ_in_seed_sample_and_position() -> None:
    n = np.arange(100_000)
    one, zero = np.ones_like(n), np.zeros_like(n)
    for seed, sample, position in [(n, zero, zero), (one, n, zero), (one, zero, n)]:
        values = uniforms(seed.astype(np.uint64), sample, position)
        assert len(np.unique(values)) == len(n)
        assert stats.kstest(values, "uniform").pvalue > 1e-3
    cube = np.stack(np.meshgrid(np.arange(20), np.arange(20), np.arange(20)), -1).reshape(-1, 3)
    assert len(np.unique(uniforms(cube[:, 0].astype(np.uint64), cube[:, 1], cube[:, 2]))) == len(
        cube
    )


def reference(logits: torch.Tensor, temperature: float, top_p: float) -> np.ndarray:
    """Exact probabilities, by a loop: most probable first until top_p is reached."""
    p = torch.softmax(logits.double() / temperature, -1).numpy()
    kept, mass = np.zeros_like(p), 0.0
    for token in np.argsort(-p, kind="stable"):
        if mass >= top_p:
            break
        kept[token] = p[token]
        mass += p[token]
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (2.0, 0.9), (0.6, 0.5), (1.0, 0.05)]
)
def test_draws_follow_the_exact_distribution(temperature: float, top_p: float) -> None:
    logits = 2 * torch.randn(40, generator=torch.Generator().manual_seed(1))
    expected = reference(logits, temperature, top_p)
    n = np.arange(COUNT)
    uniform = torch.from_numpy(uniforms(np.full(COUNT, 11, np.uint64), n % 8, n // 8))
    tokens, logprobs = draw(logits.expand(COUNT, -1), uniform, temperature, top_p)
    counts = np.bincount(tokens.numpy(), minlength=40)
    assert (counts[expected == 0] == 0).all()
    likely = expected * COUNT >= 10
    rest = [counts[~likely].sum()], [expected[~likely].sum() * COUNT]
    observed = np.append(counts[likely], rest[0] if rest[1][0] > 0 else [])
    wanted = np.append(expected[likely] * COUNT, rest[1] if rest[1][0] > 0 else [])
    if len(observed) > 1:
        assert stats.chisquare(observed, wanted).pvalue > 1e-3
    # Log-probs are after temperature, before top-p.
    exact = torch.log_softmax(logits.double() / temperature, -1)[tokens]
    assert (logprobs - exact).abs().max() <= 1e-6


def test_the_chi_square_notices_a_wrong_temperature() -> None:
    logits = 2 * torch.randn(40, generator=torch.Generator().manual_seed(1))
    n = np.arange(COUNT)
    uniform = torch.from_numpy(uniforms(np.full(COUNT, 11, np.uint64), n, n * 0))
    tokens, _ = draw(logits.expand(COUNT, -1), uniform, 1.02, 1.0)
    assert (
        stats.chisquare(
            np.bincount(tokens.numpy(), minlength=40), reference(logits, 1.0, 1.0) * COUNT
        ).pvalue
        < 1e-3
    )


def test_greedy_takes_the_lowest_of_equal_tokens_and_its_untempered_log_prob() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    tokens, logprobs = draw(logits, torch.tensor([0.999], dtype=torch.float64), 0.0, 0.5)
    assert tokens.tolist() == [1]
    assert logprobs[0] == pytest.approx(
        torch.log_softmax(logits.double(), -1)[0, 1].item(), abs=1e-6
    )


def test_the_ends_of_the_unit_interval_hit_tokens_that_exist() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]] * 2)
    edges = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(logits, edges, 1.0, 1.0)[0].tolist() == [1, 2]


def test_a_rows_draw_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(300, 37, generator=generator)
    uniform = torch.rand(300, generator=generator, dtype=torch.float64)
    for top_p in (1.0, 0.8):
        tokens, logprobs = draw(logits, uniform, 0.7, top_p)
        for some in (slice(0, 1), slice(3, 4), slice(5, 22), slice(100, 300)):
            some_tokens, some_logprobs = draw(logits[some], uniform[some], 0.7, top_p)
            assert (some_tokens == tokens[some]).all()
            assert (some_logprobs == logprobs[some]).all()


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        (Sampling(-0.1, 1.0, 4, ()), "temperature"),
        (Sampling(float("nan"), 1.0, 4, ()), "temperature"),
        (Sampling(1.0, 0.0, 4, ()), "top_p"),
        (Sampling(1.0, 1.1, 4, ()), "top_p"),
        (Sampling(1.0, 1.0, 0, ()), "max_new_tokens"),
        (Sampling(1.0, 1.0, 4, (1, 32)), "stop_ids"),
    ],
)
def test_sampling_that_has_no_meaning_is_refused_by_name(sampling: Sampling, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_sampling(sampling, 32)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("vocab", [4097, 8192, 49152])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_large_vocabularys_draws_are_those_of_sums_over_the_whole(
    vocab: int, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = 3 * torch.randn(64, vocab, generator=generator)
    logits[::2, : vocab // 2] = -torch.inf  # whole blocks without probability
    uniform = torch.rand(64, generator=generator, dtype=torch.float64)
    uniform[:2], uniform[2:4] = 0.0, 1 - 2**-53
    tokens, logprobs = draw(logits, uniform, temperature, 1.0)
    # quotients are float32, as in the draw: of logits up to 24 they are off by 1e-6
    exact = torch.log_softmax((logits / temperature).double(), -1)
    cumulative = exact.exp().cumsum(-1)
    wanted = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    # weights of float32 move the bounds between tokens by parts in 1e7
    assert torch.equal(tokens, wanted[:, 0].clamp(max=vocab - 1))
    found = exact.gather(-1, tokens[:, None])[:, 0]
    assert found.isfinite().all()
    assert ((logprobs - found).abs() <= 1e-6 + 2**-23 * found.abs()).all()


@pytest.mark.usefixtures("either_way")
def test_a_large_vocabularys_draws_follow_the_exact_distribution() -> None:
    logits = torch.full((5000,), -30.0)
    likely = torch.tensor([0, 255, 256, 300, 2047, 4999])  # the ends of blocks, and of all
    logits[likely] = torch.tensor([0.0, 1.0, 2.0, 1.0, 0.5, 1.5])
    n = np.arange(20_000)
    uniform = torch.from_numpy(uniforms(np.full(len(n), 3, np.uint64), n % 8, n // 8))
    drawn = [draw(logits.expand(2000, -1), u, 1.0, 1.0)[0] for u in uniform.split(2000)]
    counts = np.bincount(torch.cat(drawn).numpy(), minlength=5000)[likely.numpy()]
    assert counts.sum() == len(n)
    expected = torch.softmax(logits.double(), -1)[likely].numpy()
    assert stats.chisquare(counts, expected / expected.sum() * len(n)).pvalue > 1e-3


@pytest.mark.usefixtures("either_way")
def test_a_row_of_a_large_vocabulary_that_is_not_finite_has_no_log_prob() -> None:
    logits = torch.zeros(3, 5000)
    logits[0, 7], logits[1, 4999] = torch.nan, torch.inf
    tokens, logprobs = draw(logits, torch.full((3,), 0.5, dtype=torch.float64), 1.0, 1.0)
    assert logprobs.isfinite().tolist() == [False, False, True]
    assert ((tokens >= 0) & (tokens < 5000)).all()
    assert tokens[2] == 2500
