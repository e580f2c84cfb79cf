"""The embedded engine: the contract, log-probs against transformers, and what does not depend on the batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_efr.rollout.local import LocalEngine
from megatron_efr.types import Group, Prompt, Request, Response, Sampling
from tests.engine_contract import EngineContract, MakeEngine, Weights, requests

STOP = 1


def model(seed: int = 0, **changes: Any) -> Qwen2ForCausalLM:
    """A random Qwen2 of the quickstart's shape unless changed; wide enough weights that tokens are not near uniform."""
    shape: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 192,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.15,
    }
    torch.manual_seed(seed)
    built = Qwen2ForCausalLM(Qwen2Config(**(shape | changes))).eval()
    with torch.no_grad():  # transformers initialises these to constants, which would hide a mistake
        for name, parameter in built.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return built


def weights_of(built: Qwen2ForCausalLM) -> Weights:
    return [(name, parameter.detach()) for name, parameter in built.named_parameters()]


def serving(built: Qwen2ForCausalLM, slots: int = 64) -> LocalEngine:
    engine = LocalEngine(built.config.to_dict(), slots)
    engine.publish(iter(weights_of(built)), version=0)
    return engine


def answers(engine: LocalEngine, asked: list[Request], sampling: Sampling) -> dict[str, list[Response]]:
    return {group.prompt.id: group.responses for group in engine.generate(iter(asked), sampling)}


def mixed_requests(count: int, samples: int = 1, seed: int = 0, vocab: int = 32) -> list[Request]:
    """Random prompts of 1 to 40 tokens."""
    rng = np.random.default_rng(seed)
    prompts = [tuple(rng.integers(2, vocab, rng.integers(1, 41)).tolist()) for _ in range(count)]
    return [Request(Prompt(f"p{i}", tokens, "", ""), samples, 77 * i) for i, tokens in enumerate(prompts)]


class TestContract(EngineContract):
    stop_id = STOP

    @pytest.fixture
    def make_engine(self) -> MakeEngine:
        return lambda: LocalEngine(model().config.to_dict(), slots=24)

    @pytest.fixture
    def weights(self) -> tuple[Weights, Weights]:
        return weights_of(model(0)), weights_of(model(1))


def exact_logprobs(built: Qwen2ForCausalLM, prompt: Prompt, response: Response, temperature: float) -> torch.Tensor:
    with torch.no_grad():
        logits = built(torch.tensor([[*prompt.tokens, *response.tokens]])).logits[0, len(prompt.tokens) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(response.tokens)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": False}, {"num_key_value_heads": 2}, {"rope_theta": 5e5}]
)
def test_log_probs_equal_a_full_forward_of_transformers(changes: dict[str, Any], temperature: float) -> None:
    built = model(**changes)
    worst = 0.0
    for group in serving(built, slots=16).generate(mixed_requests(20, 2), Sampling(temperature, 1.0, 90, (STOP,))):
        for response in group.responses:
            exact = exact_logprobs(built, group.prompt, response, temperature)
            worst = max(worst, (exact - torch.tensor(response.logprobs)).abs().max().item())
    assert worst <= 1e-5


def test_greedy_equals_transformers_greedy() -> None:
    built = model()
    for id, responses in answers(serving(built), asked := mixed_requests(12), Sampling(0.0, 1.0, 40, (STOP,))).items():
        prompt = next(request.prompt for request in asked if request.prompt.id == id)
        theirs = built.generate(  # pyright: ignore[reportAttributeAccessIssue]
            torch.tensor([prompt.tokens]), do_sample=False, max_new_tokens=40, eos_token_id=STOP, pad_token_id=0
        )
        assert responses[0].tokens == theirs[0, len(prompt.tokens) :].tolist()


def test_first_tokens_follow_the_models_distribution() -> None:
    built = model()
    prompt = Prompt("p", (5, 9, 3), "", "")
    with torch.no_grad():
        exact = torch.softmax(built(torch.tensor([prompt.tokens])).logits[0, -1].double(), -1).numpy()
    (group,) = serving(built, slots=256).generate([Request(prompt, 20_000, 5)], Sampling(1.0, 1.0, 1, ()))
    counts = np.bincount([response.tokens[0] for response in group.responses], minlength=32)
    likely = exact * 20_000 >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(exact[likely], exact[~likely].sum()) * 20_000
    keep = wanted > 0
    assert stats.chisquare(observed[keep], wanted[keep]).pvalue > 1e-3


# What shares the batch ---------------------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "quickstart": {},
    "128": {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 2},
    "256": {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 1},
    "odd": {"intermediate_size": 170, "vocab_size": 37, "num_hidden_layers": 2},
}


def differing(a: dict[str, list[Response]], b: dict[str, list[Response]]) -> tuple[int, int]:
    """How many responses have other tokens, and how many log-probs other bits, among the prompts of `b`."""
    tokens = sum(x.tokens != y.tokens for id in b for x, y in zip(a[id], b[id], strict=True))
    bits = sum(
        p != q
        for id in b
        for x, y in zip(a[id], b[id], strict=True)
        for p, q in zip(x.logprobs, y.logprobs, strict=False)
    )
    return tokens, bits


@pytest.mark.heavy
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
        "other order": differing(everything, answers(serving(built, slots=70), asked[::-1], sampling)),
        "after a kill": differing(everything, answers(serving(built, slots=256), asked[5::7], sampling)),
        "alone": differing(everything, answers(serving(built, slots=256), asked[50:51], sampling)),
    }
    assert counts == dict.fromkeys(counts, (0, 0))


def test_nor_do_long_responses_to_long_prompts() -> None:
    built = model(max_position_embeddings=1024, num_hidden_layers=1, num_key_value_heads=2)
    rng = np.random.default_rng(0)
    lengths = (5, 190, 300, 310, 420)
    prompts = [Prompt(f"p{n}", tuple(rng.integers(2, 32, n).tolist()), "", "") for n in lengths]
    asked, sampling = [Request(prompt, 2, 7) for prompt in prompts], Sampling(1.0, 1.0, 400, ())
    everything = answers(serving(built, slots=16), asked, sampling)
    for request in asked[1:4]:
        assert differing(everything, answers(serving(built, slots=1), [request], sampling)) == (0, 0)


def test_a_used_engine_answers_as_a_fresh_one() -> None:
    built = model()
    engine, sampling = serving(built), Sampling(1.0, 0.9, 60, (STOP,))
    first = answers(engine, mixed_requests(30), sampling)
    answers(engine, mixed_requests(50, 2, seed=9), sampling)
    assert differing(first, answers(engine, mixed_requests(30), sampling)) == (0, 0)


# Ends of responses -------------------------------------------------------------------------------------------------


def test_stop_ids_end_a_response_and_belong_to_it_and_the_length_limit_cuts_the_same_tokens() -> None:
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
    groups = list(serving(model(), slots=3).generate(mixed_requests(20, 2), Sampling(1.0, 1.0, 1, ())))
    assert [group.lengths.tolist() for group in groups] == [[1, 1]] * 20


def test_the_last_position_of_the_model_can_be_used() -> None:
    built = model(max_position_embeddings=40)
    (group,) = serving(built).generate([Request(Prompt("p", (3, 4), "", ""), 1, 0)], Sampling(1.0, 1.0, 38, ()))
    exact = exact_logprobs(built, group.prompt, group.responses[0], 1.0)
    assert (exact - torch.tensor(group.responses[0].logprobs)).abs().max() <= 1e-5


# Publications ------------------------------------------------------------------------------------------------------


def test_after_a_publication_the_new_weights_speak_over_the_whole_of_what_was_said() -> None:
    old, new = model(0), model(1)
    engine = serving(old, slots=24)
    stream = engine.generate(mixed_requests(30, 2), Sampling(1.0, 1.0, 60, (STOP,)))
    groups: list[Group] = [next(stream), next(stream)]
    engine.publish(iter(weights_of(new)), version=1)
    groups += stream
    mixed = 0
    for group in groups:
        for response in group.responses:
            exact = {v: exact_logprobs(m, group.prompt, response, 1.0) for v, m in ((0, old), (1, new))}
            mixed += len(response.versions) == 2
            for version, start, end in response.versions:
                difference = exact[version][start:end] - torch.tensor(response.logprobs[start:end])
                assert difference.abs().max() <= 1e-5
    assert mixed > 5


def test_sleep_keeps_unfinished_responses_and_the_same_weights_go_on_with_the_same_tokens() -> None:
    built, sampling = model(), Sampling(1.0, 1.0, 60, (STOP,))
    asked = mixed_requests(30)
    whole = answers(serving(built, slots=8), asked, sampling)
    engine = serving(built, slots=8)
    stream = engine.generate(asked, sampling)
    groups = [next(stream)]
    engine.sleep()
    with pytest.raises(RuntimeError, match="paused"):
        next(stream)
    engine.wake()
    engine.publish(iter(weights_of(built)), version=1)
    engine.resume()
    groups += stream
    # Reading again rounds otherwise than decoding did, so only tokens are promised to agree, short of a near tie.
    assert {group.prompt.id: group.responses[0].tokens for group in groups} == {
        k: v[0].tokens for k, v in whole.items()
    }


def test_weights_are_a_snapshot_and_do_not_enter_autograd() -> None:
    built, sampling = model(), Sampling(1.0, 1.0, 30, (STOP,))
    engine = LocalEngine(built.config.to_dict(), 8)
    engine.publish(built.named_parameters(), version=0)
    before = answers(engine, mixed_requests(8), sampling)
    built(torch.tensor([[3, 4, 5]])).logits.sum().backward()
    with torch.no_grad():
        for parameter in built.parameters():
            assert parameter.grad is not None
            parameter.add_(parameter.grad)
    assert differing(before, answers(engine, mixed_requests(8), sampling)) == (0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: [*w, ("lm_head.weight", w[0][1])], r"lm_head\.weight: no such tensor"),
        (lambda w: [*w, w[3]], r"published twice"),
        (lambda w: w[:4] + w[5:], r"missing.*layers\.0\.self_attn"),
        (
            lambda w: [(w[0][0], w[0][1][:, :5]), *w[1:]],
            r"embed_tokens\.weight: shape \[32, 5\]; this model has \[32, 64\]",
        ),
    ],
)
def test_bad_weights_are_refused_by_name_and_nothing_is_served(
    change: Callable[[Weights], Weights], message: str
) -> None:
    engine = serving(model())
    with pytest.raises(ValueError, match=message):
        engine.publish(iter(change(weights_of(model()))), version=1)
    assert engine.version == -1
    with pytest.raises(RuntimeError, match="publish"):
        engine.generate(requests(1), Sampling(1.0, 1.0, 4, ()))
    engine.publish(iter(weights_of(model())), version=2)
    assert len(list(engine.generate(requests(2), Sampling(1.0, 1.0, 4, ())))) == 2


# Pause, misuse -----------------------------------------------------------------------------------------------------


def test_pausing_keeps_the_stream_and_asking_the_paused_engine_is_an_error_here() -> None:
    engine, asked, sampling = serving(model(), slots=8), mixed_requests(12), Sampling(1.0, 1.0, 40, (STOP,))
    whole = answers(engine, asked, sampling)
    stream = engine.generate(asked, sampling)
    groups = [next(stream)]
    engine.pause()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="paused"):
            groups.extend(stream)
    engine.resume()
    groups += stream
    assert differing(whole, {group.prompt.id: group.responses for group in groups}) == (0, 0)
    assert len(groups) == 12


def test_a_decoding_thread_waits_while_another_has_paused() -> None:
    engine, sampling = serving(model(), slots=8), Sampling(1.0, 1.0, 60, ())
    engine.pause()
    groups: list[Group] = []
    worker = threading.Thread(target=lambda: groups.extend(engine.generate(mixed_requests(12), sampling)))
    worker.start()
    worker.join(timeout=0.2)
    assert worker.is_alive()
    assert groups == []
    engine.resume()
    worker.join(timeout=60)
    assert len(groups) == 12


def test_a_bad_request_is_named_and_the_others_are_still_answered() -> None:
    engine = serving(model())
    bad = {
        "it has no tokens": Request(Prompt("bad", (), "", ""), 1, 0),
        r"250 tokens \+ max_new_tokens 20 = 270.*256": Request(Prompt("bad", (3,) * 250, "", ""), 1, 0),
        "vocabulary of 32": Request(Prompt("bad", (3, 32), "", ""), 1, 0),
        "samples 0": Request(Prompt("bad", (3,), "", ""), 0, 0),
        "seed -1": Request(Prompt("bad", (3,), "", ""), 1, -1),
    }
    for message, request in bad.items():
        good = mixed_requests(6)
        stream = engine.generate([*good[:3], request, *good[3:]], Sampling(1.0, 1.0, 20, ()))
        with pytest.raises(
            ValueError, match=f"prompt bad: .*{message}" if message[0] == "v" else f"prompt bad: {message}"
        ):
            next(stream)
        assert {group.prompt.id for group in stream} == {request.prompt.id for request in good}


def test_another_streams_turn_changes_no_token_of_a_response() -> None:
    built, sampling = model(), Sampling(1.0, 1.0, 40, (STOP,))
    asked = mixed_requests(40, samples=2)
    whole = answers(serving(built), asked, sampling)
    engine = serving(built, slots=8)
    disturbed: dict[str, list[Response]] = {}
    for group in engine.generate(asked, sampling):
        disturbed[group.prompt.id] = group.responses
        if len(disturbed) % 8 == 0:
            assert len(list(engine.generate(mixed_requests(5, seed=9), sampling))) == 5
    assert differing(whole, disturbed)[0] == 0
    assert all(r.versions == [(0, 0, r.length)] for responses in disturbed.values() for r in responses)
    worst = max(
        np.abs(np.subtract(x.logprobs, y.logprobs)).max()
        for id in whole
        for x, y in zip(whole[id], disturbed[id], strict=True)
    )
    assert worst <= 1e-5  # what is read again is prefilled, which rounds differently


def test_a_publication_does_not_wait_for_the_decoding_thread_to_be_done() -> None:
    built = model()
    engine = serving(built, slots=4)
    stream = engine.generate(mixed_requests(30), Sampling(1.0, 1.0, 200, ()))
    groups: list[Group] = []
    thread = threading.Thread(target=lambda: groups.extend(stream))
    thread.start()
    for version in range(1, 6):
        engine.publish(iter(weights_of(built)), version)
    published = len(groups)
    thread.join()
    assert published < 30
    assert len(groups) == 30
    assert max(len(r.versions) for group in groups for r in group.responses) > 1


def test_weights_that_give_nan_are_an_error_and_leave_no_trace() -> None:
    built, sampling = model(), Sampling(1.0, 1.0, 20, (STOP,))
    engine = serving(built)
    whole = answers(engine, mixed_requests(10), sampling)
    broken = [(name, tensor * float("nan")) for name, tensor in weights_of(built)]
    engine.publish(iter(broken), version=1)
    with pytest.raises(RuntimeError, match=r"prompt p0: .*not finite"):
        list(engine.generate(mixed_requests(10), sampling))
    engine.publish(iter(weights_of(built)), version=2)
    assert differing(whole, answers(engine, mixed_requests(10), sampling)) == (0, 0)


def test_requests_are_pulled_little_ahead_of_free_rows() -> None:
    pulled = 0

    def source() -> Iterator[Request]:
        nonlocal pulled
        for request in mixed_requests(300):
            pulled += 1
            yield request

    stream = serving(model(), slots=32).generate(source(), Sampling(1.0, 1.0, 40, (STOP,)))
    for done, _ in enumerate(stream, start=1):
        assert pulled <= done + 32 + 2 + 31  # active rows, two ahead, groups that ended in the same step
    assert pulled == 300


def test_health_reports_mean_active_rows() -> None:
    engine = serving(model(), slots=8)
    list(engine.generate(mixed_requests(16), Sampling(1.0, 1.0, 10, ())))
    health = engine.health()
    # 16 responses of 10 tokens, the first of each from prefill: two rounds of 9 steps with 8 rows
    assert health["tokens"] == 160
    assert health["mean_active"] == 8.0
    assert health["tokens_per_second"] == pytest.approx(160 / health["seconds"])
    assert engine.health() == {"tokens": 0.0, "seconds": 0.0, "tokens_per_second": 0.0, "mean_active": 0.0}
