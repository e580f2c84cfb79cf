"""The embedded engine: the contract, log-probs against transformers, and what does not depend on
the batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from megatron_efr.rollout.local.decoder import PREFILL_TOKENS
from megatron_efr.rollout.local.engine import LocalEngine
from megatron_efr.rollout.local.stream import Stream
from megatron_efr.scripts import plain
from megatron_efr.types import Prompt, Sampling
from tests.engine_contract import EngineContract, MakeEngine, Weights
from tests.small_qwen2 import (
    STOP,
    answers,
    differing,
    exact_logprobs,
    mixed_requests,
    model,
    serving,
    weights_of,
)

pytestmark = pytest.mark.alike


class TestContract(EngineContract):
    stop_id = STOP

    @pytest.fixture
    def make_engine(self) -> MakeEngine:
        return partial(LocalEngine, model().config.to_dict(), slots=24)

    @pytest.fixture
    def weights(self) -> tuple[Weights, Weights]:
        return weights_of(model(0)), weights_of(model(1))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": False}, {"num_key_value_heads": 2}, {"rope_theta": 5e5}]
)
def test_log_probs_equal_a_full_forward_of_transformers(
    changes: dict[str, Any], temperature: float
) -> None:
    built = model(**changes)
    worst = 0.0
    for group in serving(built, slots=16).generate(
        mixed_requests(20, 2), Sampling(temperature, 1.0, 90, (STOP,))
    ):
        for response in group.responses:
            exact = exact_logprobs(built, group.prompt, response, temperature)
            worst = max(worst, (exact - torch.tensor(response.logprobs)).abs().max().item())
    # by which logits are divided, with what they were rounded by
    assert worst <= 1e-5 / temperature


def test_greedy_equals_transformers_greedy() -> None:
    built = model()
    for id, responses in answers(
        serving(built), asked := mixed_requests(12), Sampling(0.0, 1.0, 40, (STOP,))
    ).items():
        prompt = next(request.prompt for request in asked if request.prompt.id == id)
        theirs = built.generate(  # pyright: ignore[reportAttributeAccessIssue]
            torch.tensor([prompt.tokens]),
            do_sample=False,
            max_new_tokens=40,
            eos_token_id=STOP,
            pad_token_id=0,
        )
        assert list(responses[0].tokens) == theirs[0, len(prompt.tokens) :].tolist()


def test_first_tokens_follow_the_models_distribution() -> None:
    built = model()
    prompt = Prompt("p", (5, 9, 3), "", "")
    with torch.no_grad():
        exact = torch.softmax(
            built(torch.tensor([prompt.tokens])).logits[0, -1].double(), -1
        ).numpy()
    (group,) = serving(built, slots=256).generate(
        [plain(prompt, 20_000, 5)], Sampling(1.0, 1.0, 1, ())
    )
    counts = np.bincount([response.tokens[0] for response in group.responses], minlength=32)
    likely = exact * 20_000 >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(exact[likely], exact[~likely].sum()) * 20_000
    keep = wanted > 0
    assert stats.chisquare(observed[keep], wanted[keep]).pvalue > 1e-3


# What shares the batch
# ---------------------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "quickstart": {},
    "128": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "256": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    },
    "SmolLM2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 2,
        "initializer_range": 0.05,
    },
    "odd": {"intermediate_size": 170, "vocab_size": 37, "num_hidden_layers": 2},
}


@pytest.mark.heavy
@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_and_log_prob_bits_do_not_depend_on_the_batch(shape: str) -> None:
    built = model(**SHAPES[shape])
    asked, sampling = mixed_requests(72, samples=2), Sampling(1.0, 1.0, 120, (STOP,))
    everything = answers(serving(built, slots=256), asked, sampling)
    lengths = [response.length for responses in everything.values() for response in responses]
    assert max(lengths) - min(lengths) > 60  # rows do come and go at different times
    counts = {
        "few slots": differing(everything, answers(serving(built, slots=40), asked, sampling)),
        "one slot": differing(everything, answers(serving(built, slots=1), asked[:6], sampling)),
        "other order": differing(
            everything, answers(serving(built, slots=70), asked[::-1], sampling)
        ),
        "after a kill": differing(
            everything, answers(serving(built, slots=256), asked[5::7], sampling)
        ),
        "alone": differing(everything, answers(serving(built, slots=256), asked[50:51], sampling)),
    }
    assert counts == dict.fromkeys(counts, (0, 0))


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("hidden", [64, 320])
def test_nor_do_long_responses_to_long_prompts(hidden: int) -> None:
    built = model(
        max_position_embeddings=1024, num_hidden_layers=1, num_key_value_heads=2, hidden_size=hidden
    )
    rng = np.random.default_rng(0)
    lengths = (5, 190, 300, 310, 420)
    prompts = [Prompt(f"p{n}", tuple(rng.integers(2, 32, n).tolist()), "", "") for n in lengths]
    asked, sampling = [plain(prompt, 2, 7) for prompt in prompts], Sampling(1.0, 1.0, 400, ())
    everything = answers(serving(built, slots=16), asked, sampling)
    for request in asked[1:4]:
        assert differing(everything, answers(serving(built, slots=1), [request], sampling)) == (
            0,
            0,
        )


@pytest.mark.usefixtures("either_way")
def test_sequences_read_together_are_what_each_is_alone() -> None:
    """Of all widths, the longest several prefills' worth, and one that is more than a prefill."""
    built = model(max_position_embeddings=4096, num_key_value_heads=2)
    decoder = serving(built)._core.decoder
    assert decoder is not None
    rng = np.random.default_rng(0)
    lengths = [5, 300, 31, 32, 33, PREFILL_TOKENS + 1, 300, *[700] * 5, 64, 1]
    sequences = [rng.integers(2, 32, length) for length in lengths]
    together = {index: (kv, logits) for index, kv, logits in decoder.read(sequences)}
    assert sorted(together) == list(range(len(lengths)))
    for index, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        ((_, kv, logits),) = decoder.read([sequence])
        assert torch.equal(together[index][1], logits), length
        assert torch.equal(together[index][0][..., :length, :], kv[..., :length, :]), length
        exact = built(torch.from_numpy(sequence)[None]).logits[0, -1]
        assert (logits - exact).abs().max() < 1e-4, length


def test_a_used_engine_answers_as_a_fresh_one() -> None:
    built = model()
    engine, sampling = serving(built), Sampling(1.0, 0.9, 60, (STOP,))
    first = answers(engine, mixed_requests(30), sampling)
    answers(engine, mixed_requests(50, 2, seed=9), sampling)
    assert differing(first, answers(engine, mixed_requests(30), sampling)) == (0, 0)


def test_few_responses_take_few_rows_and_none_take_no_memory() -> None:
    engine, prompt = serving(model(), slots=256), Prompt("p", (3, 4, 5), "", "")
    stream, cache = engine.generate([plain(prompt, 33, 1)], Sampling(1.0, 1.0, 90, ())), []
    reserve = Stream._reserve
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "_reserve", lambda *given: cache.append(reserve(*given)) or cache[-1])
        assert len(list(stream)) == 1
    assert (cache[-1].rows, cache[-1].capacity) == (64, 96), (
        "33 rows of 3 + 90 tokens, in blocks of 32"
    )
    assert engine._core.cache is None


# Ends of responses
# -------------------------------------------------------------------------------------------------


def test_stop_ids_end_a_response_and_belong_to_it_and_the_length_limit_cuts_the_same_tokens() -> (
    None
):
    engine, asked = serving(model()), mixed_requests(30, 2)
    free = answers(engine, asked, Sampling(1.0, 1.0, 50, ()))
    stopped = answers(engine, asked, Sampling(1.0, 1.0, 30, (STOP, 7)))
    finishes = set()
    for id, responses in stopped.items():
        for response, whole in zip(responses, free[id], strict=True):
            end = next((i + 1 for i, token in enumerate(whole.tokens) if token in (STOP, 7)), 51)
            assert whole.finish == "length"
            assert response.tokens == whole.tokens[: min(end, 30)]
            assert response.finish == ("stop" if end <= 30 else "length")
            finishes.add(response.finish)
    assert finishes == {"stop", "length"}


def test_a_response_may_be_one_token() -> None:
    groups = list(
        serving(model(), slots=3).generate(mixed_requests(20, 2), Sampling(1.0, 1.0, 1, ()))
    )
    assert [group.lengths.tolist() for group in groups] == [[1, 1]] * 20


def test_the_last_position_of_the_model_can_be_used() -> None:
    built = model(max_position_embeddings=40)
    (group,) = serving(built).generate(
        [plain(Prompt("p", (3, 4), "", ""), 1, 0)], Sampling(1.0, 1.0, 38, ())
    )
    exact = exact_logprobs(built, group.prompt, group.responses[0], 1.0)
    assert (exact - torch.tensor(group.responses[0].logprobs)).abs().max() <= 1e-5
