"""The embedded engine, disturbed while it answers: publications, sleep, pauses, other streams, what
it must refuse.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from megatron_efr.rollout.local.engine import LocalEngine
from megatron_efr.scripts import plain
from megatron_efr.types import Group, Prompt, Request, Response, Sampling
from tests.engine_contract import Weights, requests
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

# Publications
# --------------------------------------------------------------------------------------------------


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
            exact = {
                v: exact_logprobs(m, group.prompt, response, 1.0) for v, m in ((0, old), (1, new))
            }
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
    # Reading again rounds otherwise than decoding did, so only tokens are promised to agree, short
    # of a near tie.
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


# Pause, misuse
# --------------------------------------------------------------------------------------------------


def test_pausing_keeps_the_stream_and_asking_the_paused_engine_is_an_error_here() -> None:
    engine, asked, sampling = (
        serving(model(), slots=8),
        mixed_requests(12),
        Sampling(1.0, 1.0, 40, (STOP,)),
    )
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
    worker = threading.Thread(
        target=lambda: groups.extend(engine.generate(mixed_requests(12), sampling))
    )
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
        "it has no tokens": plain(Prompt("bad", (), "", ""), 1, 0),
        r"250 tokens \+ max_new_tokens 20 = 270.*256": plain(
            Prompt("bad", (3,) * 250, "", ""), 1, 0
        ),
        "vocabulary of 32": plain(Prompt("bad", (3, 32), "", ""), 1, 0),
        "samples 0": plain(Prompt("bad", (3,), "", ""), 0, 0),
        "seed -1": plain(Prompt("bad", (3,), "", ""), 1, -1),
    }
    for message, request in bad.items():
        good = mixed_requests(6)
        stream = engine.generate([*good[:3], request, *good[3:]], Sampling(1.0, 1.0, 20, ()))
        with pytest.raises(
            ValueError,
            match=f"prompt bad: .*{message}" if message[0] == "v" else f"prompt bad: {message}",
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
    assert all(
        r.versions == ((0, 0, r.length),) for responses in disturbed.values() for r in responses
    )
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
        # active rows, a quarter of them ahead, groups that ended in the same step
        assert pulled <= done + 32 + 8 + 31
    assert pulled == 300


def test_short_prompts_are_read_several_at_a_time_and_long_ones_as_few_as_can_be() -> None:
    """For 16 rows that end one by one: until 4 samples wait, or their prompts have 256 tokens."""
    built = model(max_position_embeddings=1024)
    rng = np.random.default_rng(0)
    for length, usual in ((20, 4), (100, 3), (300, 1)):
        engine, read = serving(built, slots=16), []
        decoder = engine._core.decoder
        assert decoder is not None

        def prefill(
            given: Sequence[np.ndarray], true: Any = decoder.prefill, read: list[int] = read
        ) -> Any:
            read.append(len(given))
            return true(given)

        decoder.prefill = prefill
        prompts = [Prompt(f"p{i}", tuple(rng.integers(2, 32, length)), "", "") for i in range(60)]
        asked = [plain(prompt, 1, i) for i, prompt in enumerate(prompts)]
        list(engine.generate(iter(asked), Sampling(1.0, 1.0, 60, (STOP,))))
        assert sum(read) == 60
        # but where many rows ended together
        assert statistics.median(read[1:]) == usual, (length, read)


def test_health_reports_mean_active_rows() -> None:
    engine = serving(model(), slots=8)
    list(engine.generate(mixed_requests(16), Sampling(1.0, 1.0, 10, ())))
    health = engine.health()
    # 16 responses of 10 tokens, the first of each from prefill: two rounds of 9 steps with 8 rows
    assert health["tokens"] == 160
    assert health["mean_active"] == 8.0
    assert health["tokens_per_second"] == pytest.approx(160 / health["seconds"])
    assert engine.health() == {
        "tokens": 0.0,
        "seconds": 0.0,
        "tokens_per_second": 0.0,
        "mean_active": 0.0,
    }
