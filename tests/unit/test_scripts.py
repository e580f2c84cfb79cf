"""Scripts: each kind on the embedded engine, held to a model that reads everything again for every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from megatron_efr.rollout.local.engine import LocalEngine
from megatron_efr.scripts import plain
from megatron_efr.types import Prompt, Request, Sampling
from tests.scripts import Letters, Rereading, assert_made, every_kind
from tests.small_qwen2 import STOP, model, weights_of

BUILT = model()
LOGITS: dict[Any, torch.Tensor] = {}
BEGUN = [(5, 9, 3), (4,), (7, 7, 8, 20, 11, 6)]
PROMPTS = [Prompt(f"p{i}", tokens, "", "") for i, tokens in enumerate(BEGUN)]


def serving(slots: int) -> LocalEngine:
    engine = LocalEngine(BUILT.config.to_dict(), slots, codec=Letters())
    engine.publish(iter(weights_of(BUILT)), version=0)
    return engine


def said(prompt: Prompt) -> Sequence[int]:
    """What the model says when it is just asked, greedily."""
    (group,) = serving(1).generate([plain(prompt, 1, 0)], Sampling(0.0, 1.0, 24, ()))
    return group.responses[0].tokens


def asked(prompts: Sequence[Prompt] = PROMPTS) -> list[Request]:
    return [Request(prompt, 100 + i, every_kind(said(prompt)), {"i": i}) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.7, 0.9)])
def test_every_kind_makes_what_a_model_makes_that_reads_everything_again(temperature: float, top_p: float) -> None:
    requests, sampling = asked(), Sampling(temperature, top_p, 30, (STOP,))
    endings = set()
    for group in serving(slots=5).generate(requests, sampling):
        request = requests[group.note["i"]]
        assert (group.scripts, group.prompt, group.seed) == (request.scripts, request.prompt, request.seed)
        for sample, (script, response) in enumerate(zip(request.scripts, group.responses, strict=True)):
            again = Rereading(BUILT, sampling, request.seed, sample, LOGITS)
            assert_made(response, again.make(script.steps(sample), request.prompt.tokens))
            endings |= {part.ending for part in response.parts}
    assert endings == {"stop", "until", "length", "forced", "chosen"}
