"""Contract of rollout engines, as a class of tests: subclass it, give the fixtures, inherit the
tests.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch

from megatron_efr.rollout.engine import Engine
from megatron_efr.scripts import Budget, EarlyExit, Forks, Opened, Plain, plain
from megatron_efr.types import Group, Prompt, Request, Response, Sampling
from tests.scripts import Letters

MakeEngine = Callable[..., Engine]
"""A fresh engine, with a `codec` if it is to read and write text."""
Weights = list[tuple[str, torch.Tensor]]


def requests(count: int, samples: int = 2, first_token: int = 3) -> list[Request]:
    """Prompts of different lengths, each with its own seed."""
    return [
        plain(
            Prompt(f"p{i}", tuple(first_token + j % 5 for j in range(1 + i % 7)), "", ""),
            samples,
            seed=1000 + i,
        )
        for i in range(count)
    ]


def check_parts(response: Response, stop_id: int, limit: int) -> None:
    """Hold a response to what its parts say of it."""
    parts, drawn = (
        response.parts,
        [part for part in response.parts if part.ending not in ("forced", "chosen")],
    )
    assert [parts[0].start, parts[-1].end] == [0, len(response.tokens)]
    assert all(one.end == other.start for one, other in pairwise(parts))
    assert response.length == len(response.tokens) - sum(
        part.end - part.start for part in parts if part.forced
    )
    assert sum(part.end - part.start for part in drawn) <= limit
    assert response.finish == ("length" if drawn[-1].ending == "length" else "stop")
    assert response.text == Letters().decode(response.tokens)
    for part in parts:
        said = response.logprobs[part.start : part.end].tolist()
        if part.ending in ("forced", "chosen"):
            first = 0.0 if part.forced else pytest.approx(math.log(0.25))
            assert said == [first, *[0.0] * (len(said) - 1)]
        else:
            assert all(logprob < 0 for logprob in said)
            assert (response.tokens[part.start : part.end][-1:] == (stop_id,)) == (
                part.ending == "stop"
            )


class EngineContract:
    """Subclasses provide `make_engine` (a fresh engine) and `weights` (two different sets that it
    can serve).

    `stop_id` must be a token that the first set of weights draws within a few tens of tokens, and
    not at once.
    """

    stop_id: int

    @pytest.fixture
    def engine(self, make_engine: MakeEngine, weights: tuple[Weights, Weights]) -> Engine:
        engine = make_engine()
        engine.publish(iter(weights[0]), version=3)
        return engine

    def sampling(self, max_new_tokens: int = 24) -> Sampling:
        return Sampling(1.0, 1.0, max_new_tokens, (self.stop_id,))

    def test_serves_nothing_before_the_first_publication(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        assert engine.version == -1
        with pytest.raises(RuntimeError, match="publish"):
            next(engine.generate(requests(1), self.sampling()))

    def test_every_request_comes_back_once_as_a_whole_group(self, engine: Engine) -> None:
        asked = requests(11, samples=3)
        groups = list(engine.generate(iter(asked), self.sampling()))
        assert sorted(group.prompt.id for group in groups) == sorted(
            request.prompt.id for request in asked
        )
        assert {group.prompt.id: group.seed for group in groups} == {
            r.prompt.id: r.seed for r in asked
        }
        assert all(len(group.responses) == 3 for group in groups)

    def test_responses_say_how_they_ended_and_have_a_log_prob_a_token(self, engine: Engine) -> None:
        finishes = set()
        for group in engine.generate(requests(40), self.sampling()):
            for response in group.responses:
                finishes.add(response.finish)
                assert len(response.logprobs) == len(response.tokens) >= 1
                assert all(logprob <= 0 for logprob in response.logprobs)
                assert self.stop_id not in response.tokens[:-1]
                assert (response.tokens[-1] == self.stop_id) == (response.finish == "stop")
                assert response.finish == "stop" or response.length == 24
                assert response.versions == ((3, 0, response.length),)
        assert finishes == {"stop", "length"}

    def test_samples_of_one_prompt_differ(self, engine: Engine) -> None:
        (group,) = engine.generate(requests(1, samples=8), self.sampling())
        assert len({tuple(response.tokens) for response in group.responses}) > 1

    def test_greedy_samples_are_equal(self, engine: Engine) -> None:
        (group,) = engine.generate(requests(1, samples=4), Sampling(0.0, 1.0, 8, ()))
        assert len({tuple(response.tokens) for response in group.responses}) == 1

    def test_a_publication_between_groups_marks_where_the_version_changed(
        self, engine: Engine, weights: tuple[Weights, Weights]
    ) -> None:
        stream = engine.generate(requests(40), self.sampling())
        groups: list[Group] = [next(stream)]
        engine.pause()
        engine.publish(iter(weights[1]), version=4)
        engine.resume()
        assert engine.version == 4
        groups += stream
        assert len(groups) == 40
        kinds = set()
        for response in (response for group in groups for response in group.responses):
            spans = response.versions
            kinds.add(tuple(span.version for span in spans))
            assert spans[0].start == 0
            assert spans[-1].end == response.length
            assert all(a.end == b.start and a.version < b.version for a, b in pairwise(spans))
            assert all(span.start < span.end for span in spans)
        assert kinds == {(3,), (3, 4), (4,)}

    def test_a_stream_waits_while_another_is_answered_and_loses_nothing(
        self, engine: Engine
    ) -> None:
        stream = engine.generate(requests(20), self.sampling())
        groups = [next(stream)]
        others = list(engine.generate(requests(5, first_token=4), self.sampling()))
        assert len(others) == 5
        groups += stream
        assert sorted(group.prompt.id for group in groups) == sorted(
            request.prompt.id for request in requests(20)
        )

    def test_a_stream_goes_on_when_more_is_asked_of_it(self, engine: Engine) -> None:
        class Feed(list[Request]):
            def __iter__(self) -> Iterator[Request]:
                return self  # type: ignore[return-value]

            def __next__(self) -> Request:
                if not self:
                    raise StopIteration
                return self.pop(0)

        asked = requests(12)
        feed = Feed(asked[:4])
        stream = engine.generate(feed, self.sampling())
        groups = [next(stream)]
        feed.extend(asked[4:8])
        groups += stream
        assert len(groups) == 8
        feed.extend(asked[8:])
        groups += stream
        assert sorted(group.prompt.id for group in groups) == sorted(
            request.prompt.id for request in asked
        )

    def test_a_closed_stream_ends_for_the_thread_that_waits_in_it(self, engine: Engine) -> None:
        stream = engine.generate(requests(20), self.sampling())
        next(stream)
        engine.pause()
        groups: list[Group] = []
        thread = threading.Thread(target=lambda: groups.extend(stream))
        thread.start()
        stream.close()
        thread.join(timeout=60)
        assert not thread.is_alive()
        assert len(groups) < 19
        engine.resume()
        assert len(list(engine.generate(requests(3), self.sampling()))) == 3

    def test_nothing_is_served_from_sleep_until_wake_and_a_publication_and_resume(
        self, engine: Engine, weights: tuple[Weights, Weights]
    ) -> None:
        engine.sleep()
        assert engine.version == -1
        for _ in range(2):
            with pytest.raises(RuntimeError):
                next(engine.generate(requests(1), self.sampling()))
            with pytest.raises(RuntimeError, match=r"publish\(\) before resume"):
                engine.resume()
            engine.wake()
        engine.publish(iter(weights[0]), version=9)
        with pytest.raises(RuntimeError, match="paused"):
            next(engine.generate(requests(1), self.sampling()))
        engine.resume()
        (group,) = engine.generate(requests(1), self.sampling())
        assert group.responses[0].versions[0].version == 9

    def test_publication_refuses_unknown_and_missing_names(
        self, engine: Engine, weights: tuple[Weights, Weights]
    ) -> None:
        name, tensor = weights[0][-1]
        with pytest.raises(ValueError, match=r"no\.such\.weight"):
            engine.publish(iter([*weights[0], ("no.such.weight", tensor)]), version=4)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            engine.publish(iter(weights[0][:-1]), version=4)

    def test_requests_are_pulled_as_needed(self, engine: Engine) -> None:
        pulled = 0

        def source() -> Iterator[Request]:
            nonlocal pulled
            for request in requests(500):
                pulled += 1
                yield request

        stream = engine.generate(source(), self.sampling())
        assert pulled == 0
        next(stream)
        assert 0 < pulled < 500

    def test_every_kind_of_script_makes_parts_that_tile_its_response(
        self, make_engine: MakeEngine, weights: tuple[Weights, Weights]
    ) -> None:
        engine = make_engine(codec=Letters())
        engine.publish(iter(weights[0]), version=3)
        scripts = (
            Plain(),
            Opened(opening="CDE"),
            Opened(opening="CD", chance=0.25),
            Budget(most=6, end="F", cut="GH", answer=9),
            EarlyExit(pauses=("C", "D", "E"), probe="I", tokens=4, sure=1e-9, end="F", exit="GH"),
            Forks(at=(1, 3), samples=2, tokens=5, opening="E"),
        )
        asked = [
            Request(each.prompt, each.seed, scripts, {"why": each.seed}) for each in requests(12)
        ]
        found = set()
        for group in engine.generate(asked, self.sampling()):
            assert (group.scripts, group.note) == (scripts, {"why": group.seed})
            for response, script in zip(group.responses, scripts, strict=True):
                found |= {(type(script), part.name, part.ending) for part in response.parts}
                check_parts(response, self.stop_id, 24)
                assert response.versions == ((3, 0, len(response.tokens)),)
                for branch in response.branches:
                    found.add((type(script), branch.part, len(branch.responses)))
                    for each in branch.responses:
                        check_parts(each, self.stop_id, 5)
        assert found >= {
            (Plain, "response", "stop"), (Plain, "response", "length"),
            (Opened, "opening", "forced"), (Opened, "opening", "chosen"),
            (Opened, "response", "stop"),
            (Budget, "thought", "length"), (Budget, "cut", "forced"), (Budget, "answer", "length"),
            (EarlyExit, "thought", "until"), (EarlyExit, "probe", 1), (EarlyExit, "exit", "forced"),
            (Forks, "response", "stop"), (Forks, "summary", 2),
        }  # fmt: skip

    def test_health_counts_tokens_since_the_last_call(self, engine: Engine) -> None:
        engine.health()
        groups = list(engine.generate(requests(5), self.sampling()))
        health = engine.health()
        assert health["tokens"] == sum(int(group.lengths.sum()) for group in groups)
        assert health["seconds"] > 0
        assert engine.health()["tokens"] == 0
