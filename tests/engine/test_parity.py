"""Log-probs of a real SGLang server are those of transformers, also across publications."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM

from megatron_efr.config import TimeoutsConfig
from megatron_efr.rollout.local.engine import LocalEngine
from megatron_efr.rollout.sglang.engine import SGLangEngine
from megatron_efr.rollout.sglang.penalty import SERVER
from megatron_efr.scripts import Budget, plain
from megatron_efr.types import Prompt, Request, Sampling
from megatron_efr.weights.architecture import Architecture
from tests.conftest import VOCAB
from tests.engine import conftest
from tests.engine.conftest import SLOTS, STOP, MakeSGLang
from tests.engine_contract import Weights
from tests.scripts import Letters, Rereading, assert_made, every_kind, every_rule

TOLERANCE = 1e-5
Models = tuple[Qwen2ForCausalLM, Qwen2ForCausalLM]


def weights_of(model: Qwen2ForCausalLM) -> Weights:
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def asked(count: int, samples: int) -> list[Request]:
    """Random prompts of 1 to 40 tokens, two of them with 30 tokens in common."""
    rng = np.random.default_rng(0)
    prompts = [
        tuple(rng.integers(3, VOCAB, rng.integers(1, 41)).tolist()) for _ in range(count - 1)
    ]
    prompts.append((*max(prompts, key=len)[:30], 5, 6))
    return [plain(Prompt(f"p{i}", tokens, "", ""), samples, i) for i, tokens in enumerate(prompts)]


def exact_logprobs(
    model: Qwen2ForCausalLM, prompt: Prompt, tokens: tuple[int, ...], temperature: float
) -> torch.Tensor:
    """[response] log-probs of `tokens` after `prompt`, from one forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt.tokens, *tokens]])).logits[
            0, len(prompt.tokens) - 1 : -1
        ]
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(tokens)[:, None])[
        :, 0
    ]


@pytest.fixture
def engine(make_engine: MakeSGLang) -> SGLangEngine:
    return make_engine()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (0.6, 0.9)])
def test_log_probs_are_those_after_temperature_and_before_top_p(
    engine: SGLangEngine, models: Models, temperature: float, top_p: float
) -> None:
    engine.publish(weights_of(models[0]), version=1)
    worst = 0.0
    for group in engine.generate(asked(12, 2), Sampling(temperature, top_p, 60, (STOP,))):
        for response in group.responses:
            exact = exact_logprobs(models[0], group.prompt, response.tokens, temperature)
            worst = max(worst, (exact - torch.tensor(response.logprobs)).abs().max().item())
    assert worst <= TOLERANCE


def test_every_part_of_a_response_matches_the_weights_it_was_drawn_from(
    engine: SGLangEngine, models: Models
) -> None:
    engine.publish(weights_of(models[0]), version=1)
    stream = engine.generate(asked(24, 2), Sampling(1.0, 1.0, 400, (STOP,)))
    groups = [next(stream)]
    engine.publish(weights_of(models[1]), version=2)
    groups += [next(stream)]
    engine.publish(weights_of(models[0]), version=3)
    groups += stream
    assert len(groups) == 24
    worst, kinds = 0.0, set()
    for group in groups:
        for response in group.responses:
            kinds.add(tuple(span.version for span in response.versions))
            assert all(a.end == b.start for a, b in pairwise(response.versions))
            for version, start, end in response.versions:
                exact = exact_logprobs(models[version == 2], group.prompt, response.tokens, 1.0)[
                    start:end
                ]
                worst = max(
                    worst, (exact - torch.tensor(response.logprobs[start:end])).abs().max().item()
                )
    assert worst <= TOLERANCE
    assert any(len(kind) > 1 for kind in kinds)


def test_a_prompt_that_was_read_is_found_in_the_cache_until_weights_change(
    engine: SGLangEngine, models: Models
) -> None:
    engine.publish(weights_of(models[0]), version=1)
    shares = []
    for _ in range(2):
        engine.health()
        assert len(list(engine.generate(asked(6, 1), Sampling(1.0, 1.0, 2, ())))) == 6
        shares.append(engine.health()["cached_share"])
    engine.publish(weights_of(models[1]), version=2)
    assert len(list(engine.generate(asked(6, 1), Sampling(1.0, 1.0, 2, ())))) == 6
    shares.append(engine.health()["cached_share"])
    assert shares[1] > 0.8  # the others find no more than what prompts of one call share
    assert shares[0] < 0.5
    assert shares[2] < 0.5


def test_weights_in_several_buckets_are_those_in_one(
    make_engine: MakeSGLang, models: Models
) -> None:
    one, several = make_engine(), make_engine()
    one.publish(weights_of(models[0]), version=1)
    first = one.checksums()
    one.publish(weights_of(models[1]), version=2)
    assert one.checksums() != first
    several.bucket_bytes = 20_000
    several.publish(weights_of(models[0]), version=3)
    assert several.checksums() == first


@pytest.mark.parametrize("prompt", [(5, 9, 3), (4,), (7, 7, 8, 20, 11, 6)])
def test_every_kind_of_script_says_greedily_what_the_embedded_engine_does(
    make_engine: MakeSGLang, models: Models, folders: tuple[Path, Path], prompt: tuple[int, ...]
) -> None:
    assert_same_as_embedded(
        make_engine(codec=Letters()), models, folders[0], prompt, penalised=False
    )


@pytest.mark.slow
def test_a_penalty_on_tokens_is_the_embedded_engines(
    models: Models, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """On servers that take a logit processor, which are an evaluation's own."""
    launcher, urls = conftest.start(tmp_path, conftest.rollout(), folders[0], SERVER)
    architecture = Architecture.from_folder(folders[0])
    with launcher:
        theirs = SGLangEngine(
            urls,
            architecture,
            SLOTS,
            TimeoutsConfig(),
            key=launcher.key,
            penalties=True,
            codec=Letters(),
        )
        for prompt in ((5, 9, 3), (4,), (7, 7, 8, 20, 11, 6)):
            assert_same_as_embedded(theirs, models, folders[0], prompt, penalised=True)
        theirs.close()


def assert_same_as_embedded(
    theirs: SGLangEngine, models: Models, folder: Path, prompt: tuple[int, ...], *, penalised: bool
) -> None:
    """Both engines make, token for token, what a model makes that reads everything again."""
    ours = LocalEngine(folder, 4, codec=Letters())
    for engine in (theirs, ours):
        engine.publish(weights_of(models[0]), version=1)
    sampling, question = Sampling(0.0, 1.0, 30, (STOP,)), Prompt("p", prompt, "", "")
    (plain_group,) = ours.generate([plain(question, 1, 0)], sampling)
    said = plain_group.responses[0].tokens
    scripts = [
        script
        for script in every_kind(said) + every_rule(said)
        if bool(script.penalised) == penalised
    ]
    request = Request(question, 7, tuple(scripts))
    (here,), (there,) = ours.generate([request], sampling), theirs.generate([request], sampling)
    logits: dict[Any, torch.Tensor] = {}
    for sample, script in enumerate(request.scripts):
        made = Rereading(models[0], sampling, 7, sample, logits).make(script.steps(sample), prompt)
        assert_made(here.responses[sample], made)
        assert_made(there.responses[sample], made)
        assert there.responses[sample].versions == here.responses[sample].versions
        assert not penalised or made.tokens != list(said), (
            "a penalty that changes nothing would show nothing"
        )
    assert there.scripts == request.scripts


def test_a_script_goes_on_across_a_publication(make_engine: MakeSGLang, models: Models) -> None:
    """Each drawn token has the log-prob that the weights of its span give it, after all that was
    said before.
    """
    engine = make_engine(codec=Letters())
    engine.publish(weights_of(models[0]), version=1)
    script = Budget(most=60, end="B", cut="CDE", answer=200)
    asked = [Request(Prompt(f"p{i}", (5 + i, 6), "", ""), i, (script,) * 2) for i in range(24)]
    stream = engine.generate(asked, Sampling(1.0, 1.0, 300, (STOP,)))
    groups = [next(stream)]
    engine.publish(weights_of(models[1]), version=2)
    groups += stream
    worst, kinds = 0.0, set()
    for group in groups:
        for response in group.responses:
            kinds.add(tuple(span.version for span in response.versions))
            assert [response.versions[0].start, response.versions[-1].end] == [
                0,
                len(response.tokens),
            ]
            assert all(a.end == b.start for a, b in pairwise(response.versions))
            for version, start, end in response.versions:
                exact = exact_logprobs(models[version == 2], group.prompt, response.tokens, 1.0)[
                    start:end
                ]
                difference = (exact - torch.tensor(response.logprobs[start:end])).abs()
                worst = max(
                    worst, difference[torch.tensor(response.trained[start:end])].max().item()
                )
    assert worst <= TOLERANCE
    assert any(len(kind) > 1 for kind in kinds)
