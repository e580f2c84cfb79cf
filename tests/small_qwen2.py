"""A small random Qwen2, the embedded engine that serves it, and comparisons of what it answered."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_efr.rollout.local.engine import LocalEngine
from megatron_efr.scripts import plain
from megatron_efr.types import Prompt, Request, Response, Sampling
from tests.engine_contract import Weights

STOP = 1


def model(seed: int = 0, **changes: Any) -> Qwen2ForCausalLM:
    """A random Qwen2 of the quickstart's shape unless changed; wide enough weights that tokens are
    not near uniform.
    """
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


def answers(
    engine: LocalEngine, asked: list[Request], sampling: Sampling
) -> dict[str, tuple[Response, ...]]:
    return {group.prompt.id: group.responses for group in engine.generate(iter(asked), sampling)}


def mixed_requests(count: int, samples: int = 1, seed: int = 0, vocab: int = 32) -> list[Request]:
    """Random prompts of 1 to 40 tokens."""
    rng = np.random.default_rng(seed)
    prompts = [tuple(rng.integers(2, vocab, rng.integers(1, 41)).tolist()) for _ in range(count)]
    return [
        plain(Prompt(f"p{i}", tokens, "", ""), samples, 77 * i) for i, tokens in enumerate(prompts)
    ]


def exact_logprobs(
    built: Qwen2ForCausalLM, prompt: Prompt, response: Response, temperature: float
) -> torch.Tensor:
    with torch.no_grad():
        logits = built(torch.tensor([[*prompt.tokens, *response.tokens]])).logits[
            0, len(prompt.tokens) - 1 : -1
        ]
    return torch.log_softmax(logits / temperature, -1).gather(
        1, torch.tensor(response.tokens)[:, None]
    )[:, 0]


def differing(
    a: dict[str, tuple[Response, ...]], b: dict[str, tuple[Response, ...]]
) -> tuple[int, int]:
    """Numbers of responses with other tokens, and of log-probs with other bits, by prompts of
    `b`.
    """
    tokens = sum(x.tokens != y.tokens for id in b for x, y in zip(a[id], b[id], strict=True))
    bits = sum(
        p != q
        for id in b
        for x, y in zip(a[id], b[id], strict=True)
        for p, q in zip(x.logprobs, y.logprobs, strict=False)
    )
    return tokens, bits
