"""Scripts: each kind on the embedded engine, held to a model that reads everything again; and what
is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from megatron_efr.config import ConfigError, RolloutConfig
from megatron_efr.config.file import validate
from megatron_efr.rollout.checks import check_script, longest
from megatron_efr.rollout.local.decoder import Decoder
from megatron_efr.rollout.local.engine import LocalEngine
from megatron_efr.scripts import Budget, EarlyExit, Forks, Opened, Plain, build, plain
from megatron_efr.steps import Draw, Fork, Part, Step
from megatron_efr.types import Done, Prompt, Request, Response, Sampling
from tests.scripts import Letters, Rereading, assert_made, every_kind, every_rule, rounds
from tests.small_qwen2 import STOP, exact_logprobs, model, weights_of

pytestmark = pytest.mark.alike

BUILT = model()
LOGITS: dict[Any, torch.Tensor] = {}
BEGUN = [(5, 9, 3), (4,), (7, 7, 8, 20, 11, 6)]
PROMPTS = [Prompt(f"p{i}", tokens, "", "") for i, tokens in enumerate(BEGUN)]


def serving(slots: int) -> LocalEngine:
    engine = LocalEngine(BUILT.config.to_dict(), slots, codec=Letters())
    engine.publish(iter(weights_of(BUILT)), version=0)
    return engine


def said(prompt: Prompt) -> Sequence[int]:
    """The model's greedy answer when it is just asked."""
    (group,) = serving(1).generate([plain(prompt, 1, 0)], Sampling(0.0, 1.0, 24, ()))
    return group.responses[0].tokens


def asked(prompts: Sequence[Prompt] = PROMPTS) -> list[Request]:
    return [
        Request(prompt, 100 + i, every_kind(said(prompt)), {"i": i})
        for i, prompt in enumerate(prompts)
    ]


def rules(prompts: Sequence[Prompt] = PROMPTS) -> list[Request]:
    trial = 0.9  # of trial answers, beside responses at the sampling's
    return [
        Request(prompt, 100 + i, every_rule(said(prompt), trial), {"i": i})
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("asked", [asked, rules])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.7, 0.9)])
def test_every_kind_makes_what_a_model_makes_that_reads_everything_again(
    asked: Callable[[], list[Request]], temperature: float, top_p: float
) -> None:
    requests, sampling = asked(), Sampling(temperature, top_p, 30, (STOP,))
    endings = set()
    for group in serving(slots=5).generate(requests, sampling):
        request = requests[group.note["i"]]
        assert (group.scripts, group.prompt, group.seed) == (
            request.scripts,
            request.prompt,
            request.seed,
        )
        for sample, (script, response) in enumerate(
            zip(request.scripts, group.responses, strict=True)
        ):
            again = Rereading(BUILT, sampling, request.seed, sample, LOGITS)
            assert_made(response, again.make(script.steps(sample), request.prompt.tokens))
            endings |= {part.ending for part in response.parts}
    assert endings - {"chosen"} == {"stop", "until", "length", "forced"}


def test_a_round_begins_anew_with_the_summary_alone() -> None:
    """Greedily: each further round is what the model says after the prompt, and the summary of the
    round before.
    """
    found = 0
    for prompt in PROMPTS:
        script = rounds(said(prompt))
        (group,) = serving(2).generate([Request(prompt, 1, (script,))], Sampling(0.0, 1.0, 30, ()))
        response = group.responses[0]
        texts = [response.text, *(each.text for _, each in response.answers)]
        assert response.length == 8
        for before, (at, each) in zip(texts, response.answers, strict=False):
            opening = Letters().encode(f"G{script.summary(before)}HG")
            assert (at, each.tokens[: len(opening)], each.length) == (0, opening, 8)
            anew = Prompt("", (*prompt.tokens, *opening), "", "")
            assert each.tokens[len(opening) :] == tuple(said(anew)[:8])
        assert len(texts) == 3 or not script.summary(texts[-1])
        found += len(response.answers)
    assert found >= 2
    with pytest.raises(
        ConfigError, match=r"tells no round of the one before; put \{summary\} where"
    ):
        build("rounds", {"tokens": 4, "history": "so"}, "method")
    with pytest.raises(ConfigError, match="holds '<summary>', and each round would have a summary"):
        build("rounds", {"tokens": 4, "history": "<summary>{summary}"}, "method")
    with pytest.raises(ConfigError, match=r"^evaluation\.script\.name: rounds are for training"):
        rounds(said(PROMPTS[0])).check(30, "evaluation.script")
    made: Any = build("rounds", {"tokens": 4}, "method")
    assert made.summary("a<summary> b </summary>c") == "b"
    for text in (
        "<summary>b",
        "<summary></summary>",
        "b</summary>",
        "<summary>a</summary><summary>b",
    ):
        assert made.summary(text) == ""


def test_published_rules_take_the_turns_that_are_compared() -> None:
    parts = {
        (type(script).__name__, part.name, part.ending)
        for group in serving(slots=5).generate(rules(), Sampling(0.0, 1.0, 30, (STOP,)))
        for script, response in zip(group.scripts, group.responses, strict=True)
        for each in (response, *(made for branch in response.branches for made in branch.responses))
        for part in each.parts
    }
    assert parts >= {
        ("CutOff", "response", "length"), ("NoThinking", "opening", "forced"),
        ("Elastic", "cut", "forced"),
        ("S1", "wait", "forced"), ("S1", "header", "forced"), ("S1", "answer", "length"),
        ("Deer", "thought", "until"), ("Deer", "thought", "length"), ("Deer", "probe", "until"),
        ("Deer", "end", "length"), ("Deer", "probe", "length"), ("Deer", "exit", "forced"),
        ("EarlyStop", "thought", "until"), ("EarlyStop", "probe", "length"),
        ("EarlyStop", "answer", "length"),
        ("Subthoughts", "subthought", "length"), ("Told", "response", "stop"),
        ("Concise", "phrase", "forced"),
        ("VgSearch", "search", "stop"), ("VgSearch", "search", "length"),
        ("SummaryThinking", "summary", "length"),
        ("SummaryThinking", "cut", "forced"), ("SummaryThinking", "answer", "length"),
    }  # fmt: skip


def test_tokens_and_bits_do_not_depend_on_the_batch() -> None:
    """Rows that wait for their branches leave the batch and come back."""
    requests, sampling = asked(), Sampling(1.0, 1.0, 40, (STOP,))

    def made(slots: int, order: int) -> dict[int, str]:
        groups = serving(slots).generate(requests[::order], sampling)
        return {
            group.seed: str([bits(response) for response in group.responses]) for group in groups
        }

    assert made(64, 1) == made(3, -1) == made(1, 1)


def bits(response: Response) -> tuple[Any, ...]:
    branches = [[bits(each) for each in branch.responses] for branch in response.branches]
    return response.tokens, response.logprobs.tolist(), response.parts, response.finish, branches


def test_after_a_publication_a_script_goes_on_with_the_new_weights() -> None:
    """Parents that wait for branches, and branches themselves, are read again by the new
    weights.
    """
    other = model(1)
    engine, sampling = serving(slots=7), Sampling(1.0, 1.0, 60, (STOP,))
    scripts = (
        Forks(at=(2, 5), samples=2, tokens=30, opening="GH"),
        EarlyExit(pauses=("C", "E"), probe="D", end="F"),
        Budget(most=40, end="@", cut="DE"),
    )
    requests = [Request(Prompt(f"p{i}", (5 + i % 9, 6), "", ""), i, scripts) for i in range(24)]
    stream = engine.generate(requests, sampling)
    groups = [next(stream), next(stream)]
    engine.publish(iter(weights_of(other)), version=1)
    groups += stream
    kinds = set()
    for group in groups:
        for response in group.responses:
            kinds.add(tuple(span.version for span in response.versions))
            check_versions(response, group.prompt.tokens, (BUILT, other))
            for branch in response.branches:
                for each in branch.responses:
                    kinds.add(("branch", *[span.version for span in each.versions]))
                    check_versions(
                        each, (*group.prompt.tokens, *response.tokens[: branch.at]), (BUILT, other)
                    )
    assert {(0, 1), (1,), (0,), ("branch", 0, 1), ("branch", 0), ("branch", 1)} <= kinds


def check_versions(response: Response, begun: tuple[int, ...], models: tuple[Any, Any]) -> None:
    """Every drawn token has the log-prob that its version gives it after all that was said
    before.
    """
    assert [response.versions[0].start, response.versions[-1].end] == [0, len(response.tokens)]
    assert all(a.end == b.start for a, b in pairwise(response.versions))
    prompt = Prompt("p", begun, "", "")
    exact = {
        version: exact_logprobs(models[version], prompt, response, 1.0)
        for version, *_ in response.versions
    }
    for version, start, end in response.versions:
        difference = np.abs(exact[version][start:end].numpy() - response.logprobs[start:end])
        assert difference[response.trained[start:end]].max(initial=0.0) <= 1e-5


def test_forced_tokens_are_outside_length_and_training_and_chosen_ones_are_not() -> None:
    parts = (
        Part("opening", 0, 2, "chosen"),
        Part("thought", 2, 5, "length"),
        Part("cut", 5, 6, "forced"),
    )
    response = Response(
        tuple(range(9)), np.zeros(9), "stop", parts=(*parts, Part("answer", 6, 9, "stop"))
    )
    assert response.length == 8
    assert response.trained.tolist() == [True] * 5 + [False] + [True] * 3
    assert not response.truncated
    bare = Response((1, 2), np.zeros(2), "length")
    assert (bare.length, bare.trained.tolist(), bare.truncated) == (2, [True, True], True)


def test_a_thought_that_uses_all_tokens_up_leaves_a_cut_answer_of_none() -> None:
    never = Letters().decode([next(token for token in range(32) if token not in said(PROMPTS[0]))])
    request = Request(PROMPTS[0], 0, (Budget(most=6, end=never, cut="CD"),))
    (group,) = serving(1).generate([request], Sampling(0.0, 1.0, 6, ()))
    (response,) = group.responses
    wanted = [("thought", 0, 6, "length"), ("cut", 6, 8, "forced"), ("answer", 8, 8, "length")]
    assert response.parts == tuple(wanted)
    assert (response.length, response.finish) == (6, "length")


def test_a_pause_that_is_the_last_token_allowed_ends_the_response() -> None:
    """It is held back, tried, and then drawn after all: there the response has all its tokens."""
    prompt = PROMPTS[0]
    other = Letters().decode([next(token for token in range(3, 32) if token not in said(prompt))])
    at = max(i for i in range(1, 12) if said(prompt)[i] not in said(prompt)[:i])
    sampling = Sampling(0.0, 1.0, at + 1, ())
    pause = Letters().decode([said(prompt)[at]])
    script = EarlyExit(
        pauses=(pause,), probe="C", tokens=3, sure=1.0, end=other, exit="FG", tries=1
    )
    (group,) = serving(2).generate([Request(prompt, 0, (script,))], sampling)
    (response,) = group.responses
    assert_made(
        response, Rereading(BUILT, sampling, 0, 0, LOGITS).make(script.steps(0), prompt.tokens)
    )
    assert (response.tokens, response.finish) == (tuple(said(prompt)[: at + 1]), "length")


# -- what is refused
# --------------------------------------------------------------------------------------------------


def test_a_text_of_several_tokens_that_is_to_end_a_draw_is_refused_by_its_key() -> None:
    codec = Letters()
    check_script(Budget(most=3, end="A"), codec, "evaluation.script")
    with pytest.raises(
        ConfigError,
        match=r"^evaluation\.script\.end: '</think>' is 8 tokens of this model's tokenizer",
    ):
        check_script(Budget(most=3), codec, "evaluation.script")
    with pytest.raises(ConfigError, match=r"^evaluation\.script\.pauses: 'Wait' is 4 tokens"):
        check_script(EarlyExit(end="A"), codec, "evaluation.script")
    with pytest.raises(ConfigError, match=r"^prompt p0: script\.end: '</think>' is 8 tokens"):
        next(
            serving(1).generate(
                [Request(PROMPTS[0], 0, (Budget(most=3),))], Sampling(1.0, 1.0, 8, ())
            )
        )


def test_what_a_script_writes_must_fit_the_models_positions() -> None:
    assert longest(Plain(), 100, Letters()) == 100
    assert longest(Budget(most=9, cut="DEF", least=2, wait="CC", waits=3), 100, Letters()) == 109
    assert longest(Forks(at=(3,), tokens=20, opening="DE"), 100, Letters()) == 122
    request = Request(PROMPTS[0], 0, (Opened(opening="C" * 10),))
    assert len(list(serving(1).generate([request], Sampling(0.0, 1.0, 243, (STOP,))))) == 1
    with pytest.raises(
        ValueError, match=r"^prompt p0: 3 tokens \+ max_new_tokens 244 \+ 10 of its script = 257"
    ):
        next(serving(1).generate([request], Sampling(0.0, 1.0, 244, ())))


def test_options_and_names_are_refused_by_their_path() -> None:
    assert build("budget", {"most": 7, "end": "A"}, "x") == Budget(most=7, end="A")
    assert build("forks", {"at": [1, 2], "tokens": 3}, "x") == Forks(at=(1, 2), tokens=3)
    with pytest.raises(
        ConfigError,
        match=r"^evaluation\.script\.name: no script 'elastik'; there are plain, opened",
    ):
        build("elastik", {}, "evaluation.script")
    with pytest.raises(ConfigError, match=r"evaluation\.script\.most"):
        build("budget", {"most": 0}, "evaluation.script")
    for options in ({}, {"shares": [0.5], "drawn": 2}):
        with pytest.raises(
            ConfigError,
            match="shares: give either shares of the thought, or how many exits are drawn",
        ):
            build("exits", {"tokens": 4, **options}, "evaluation.script")
    with pytest.raises(ConfigError, match="ended: a thought without `end` never ends by itself"):
        build("forks", {"at": [1], "tokens": 4, "ended": "E"}, "evaluation.script")
    with pytest.raises(ConfigError, match="least: 9 is above most = 7"):
        build("budget", {"most": 7, "least": 9}, "evaluation.script")


@pytest.mark.parametrize(
    "key", ["repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias"]
)
def test_training_refuses_a_token_penalty_by_its_key(key: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"rollout\.{key}: tokens that were drawn with a penalty are not"
    ):
        validate(RolloutConfig, {key: 1.1}, prefix="rollout")


class Nowhere(Plain):
    """A script that forks at none of its lengths."""

    def steps(self, sample: int) -> Generator[Step, Done, None]:
        yield Draw("response", 3)
        yield Fork("summary", (), 2, "C", 4)


def test_a_fork_without_places_leaves_the_response_as_it_is() -> None:
    (group,) = serving(1).generate(
        [Request(PROMPTS[0], 0, (Nowhere(),))], Sampling(0.0, 1.0, 24, ())
    )
    assert (group.responses[0].tokens, group.responses[0].branches) == (
        tuple(said(PROMPTS[0])[:3]),
        (),
    )


class Behind(Plain):
    """A script whose branches stand behind tokens that no cache has."""

    def steps(self, sample: int) -> Generator[Step, Done, None]:
        done = yield Draw("response", 3)
        starts = tuple(Letters().encode(text) for text in ("C", "DE", "FGH", "IJKL"))
        yield Fork("step", (done.part.end,) * 4, 1, "", 2, after=starts)


def test_branches_that_no_cache_has_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one they would take as many passes through the model as there are branches."""
    read: list[list[int]] = []
    whole = Decoder.read

    def noted(decoder: Decoder, sequences: Sequence[np.ndarray]) -> Iterator[Any]:
        read.append([len(sequence) for sequence in sequences])
        return whole(decoder, sequences)

    monkeypatch.setattr(Decoder, "read", noted)
    asked = len(PROMPTS[0].tokens)
    list(serving(8).generate([Request(PROMPTS[0], 0, (Behind(),))], Sampling(0.0, 1.0, 24, ())))
    # the prompt, then each branch without its last token
    assert [each for each in read if each] == [[asked], [asked + 3 + n for n in (0, 1, 2, 3)]]
    read.clear()
    list(serving(2).generate([Request(PROMPTS[0], 0, (Behind(),))], Sampling(0.0, 1.0, 24, ())))
    assert [len(each) for each in read if each][:2] == [1, 2], "no more than there are rows for"


class Wrong(Plain):
    """A script that goes on if the response has ended."""

    def steps(self, sample: int) -> Generator[Step, Done, None]:
        yield Draw("response")
        yield Draw("more")


def test_a_script_that_draws_after_a_stop_token_is_told_so() -> None:
    with pytest.raises(RuntimeError, match="the step 'more' comes after a stop token"):
        list(
            serving(1).generate(
                [Request(PROMPTS[0], 0, (Wrong(),))], Sampling(1.0, 1.0, 200, (STOP,))
            )
        )
