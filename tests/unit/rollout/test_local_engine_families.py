"""The embedded engine beyond Qwen2: log-probs and greedy tokens are transformers', whatever the
batch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_efr.rollout.local.engine import LocalEngine
from megatron_efr.scripts import plain
from megatron_efr.types import Prompt, Request, Response, Sampling
from tests.families import FAMILIES, make_family_folder

pytestmark = pytest.mark.alike

SAMPLING = Sampling(0.8, 1.0, 40, (2,))
DECODED = [family for family in FAMILIES if family != "qwen2"]  # which has tests of its own


def asked(count: int, samples: int) -> list[Request]:
    """Random prompts of 1 to 40 tokens."""
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(3, 61, rng.integers(1, 41)).tolist()) for _ in range(count)]
    return [
        plain(Prompt(f"p{i}", tokens, "", ""), samples, 77 * i) for i, tokens in enumerate(prompts)
    ]


def answers(
    folder: Path, slots: int, requests: list[Request], sampling: Sampling = SAMPLING
) -> dict[str, tuple[Response, ...]]:
    engine = LocalEngine(folder, slots)
    engine.publish(load_file(folder / "model.safetensors").items(), version=0)
    return {group.prompt.id: group.responses for group in engine.generate(iter(requests), sampling)}


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("family", DECODED)
def test_log_probs_equal_a_full_forward_of_transformers(family: str, tmp_path: Path) -> None:
    folder = make_family_folder(tmp_path, family)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    requests = asked(12, samples=2)
    found = answers(folder, 16, requests)
    compared = 0
    for request in requests:
        for response in found[request.prompt.id]:
            tokens = [*request.prompt.tokens, *response.tokens]
            with torch.no_grad():
                logits = reference(torch.tensor([tokens])).logits[
                    0, len(request.prompt.tokens) - 1 : -1
                ]
            wanted = torch.log_softmax(logits.double() / SAMPLING.temperature, -1)
            wanted = wanted.gather(1, torch.tensor(response.tokens)[:, None])[:, 0]
            assert float((torch.tensor(response.logprobs) - wanted).abs().max()) <= 1e-5
            compared += len(response.tokens)
    assert compared > 300


@pytest.mark.parametrize("family", DECODED)
def test_greedy_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    folder = make_family_folder(tmp_path, family)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    requests = asked(6, samples=1)
    found = answers(folder, 16, requests, replace(SAMPLING, temperature=0.0, max_new_tokens=60))
    for request in requests:
        prompt, [response] = torch.tensor([request.prompt.tokens]), found[request.prompt.id]
        with torch.no_grad():
            wanted = reference.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=60,
                eos_token_id=2,
                pad_token_id=0,
            )  # fmt: skip
        assert list(response.tokens) == wanted[0, prompt.shape[1] :].tolist()


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe", "llama3", "mistral", "qwen2-yarn"])
def test_tokens_and_log_prob_bits_do_not_depend_on_the_batch(family: str, tmp_path: Path) -> None:
    folder = make_family_folder(tmp_path, family)
    requests = asked(40, samples=3)
    together = answers(folder, 100, requests)
    few = answers(folder, 5, requests[::-1])
    alone = {
        key: value
        for request in requests[:5]
        for key, value in answers(folder, 64, [request]).items()
    }
    for other in (few, alone):
        for key, responses in other.items():
            for mine, theirs in zip(responses, together[key], strict=True):
                assert mine.tokens == theirs.tokens
                assert np.array_equal(mine.logprobs, theirs.logprobs)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("processor", ["this", "one that does not multiply bfloat16"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3-moe", "llama3"])
def test_a_bfloat16_engine_is_as_close_to_exact_as_transformers_in_bfloat16(
    family: str, processor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if processor != "this":
        monkeypatch.setattr("megatron_efr.rollout.local.products.multiplied", lambda: False)
    folder = make_family_folder(tmp_path, family)
    weights = {name: w.bfloat16() for name, w in load_file(folder / "model.safetensors").items()}
    engine = LocalEngine(folder, 16, dtype=torch.bfloat16)
    engine.publish(weights.items(), version=0)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float()
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ours, theirs = [], []
    for group in engine.generate(iter(asked(12, samples=2)), replace(SAMPLING, temperature=1.0)):
        prompt = group.prompt.tokens
        for response in group.responses:
            tokens, drawn = torch.tensor([[*prompt, *response.tokens]]), len(prompt) - 1
            with torch.no_grad():
                wanted, other = (
                    torch.log_softmax(model(tokens).logits[0, drawn:-1].double(), -1).gather(
                        1, torch.tensor(response.tokens)[:, None]
                    )[:, 0]
                    for model in (exact, rounded)
                )
            ours.append((torch.tensor(response.logprobs) - wanted).abs())
            theirs.append((other - wanted).abs())
    error = torch.cat(ours).mean().item()
    # transformers rounds logits too
    assert 1e-4 < error <= min(1e-2, torch.cat(theirs).mean().item())
