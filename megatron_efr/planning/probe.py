"""Seconds of the parts of an iteration on this CPU, measured with models of the same widths and few
layers.

The engine and the policy themselves are timed, not products alone: what is not a product takes its
share of a small model's time. A further layer takes what it adds to a model of small vocabulary:
beside a whole vocabulary its time would be within the measurement's error.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_efr.algorithms.objective import Objective
from megatron_efr.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_efr.policy import Policy, join_ranks, policy_loss
from megatron_efr.rollout.local.engine import LocalEngine
from megatron_efr.samples import PackedBatch, Sample
from megatron_efr.scripts import plain
from megatron_efr.types import Prompt, Sampling
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import RandomWeights

TURNS = 2  # of which the fastest counts: what else the machine does only adds to a time
STEPS = 6  # decoded to time one
FURTHER = 4  # layers, which are timed together
VOCABULARY = 256  # of the models that layers are timed with
# tokens of a batch, and how much larger a second one is: what that takes more is the time of the
# sequences that it has more
FEW, TIMES = 512, 4


class Work(NamedTuple):
    """Work that is timed: `groups` prompts and `samples` responses to each, of so many tokens."""

    groups: int
    samples: int
    prompt: int
    response: int
    beyond: int  # tokens by which half a response is longer than half of the timed one
    budget: int  # tokens of a micro-batch


class Seconds(NamedTuple):
    """Of a prompt, a step of one prompt's rows and of all rows, a sequence's log-probs, its part of
    an update, an update's rest.
    """

    prefill: float
    few: float
    full: float
    score: float
    train: float
    update: float


def measured(raw: Mapping[str, Any], model: ModelConfig, work: Work) -> Seconds:
    """For the model of config.json `raw`, in the type and with the layers that `model` names."""
    layers = int(raw["num_hidden_layers"])
    one = _seconds(_cut(raw, 1, raw["vocab_size"]), model, work)
    few, more = (_seconds(_cut(raw, depth, VOCABULARY), model, work) for depth in (1, 1 + FURTHER))
    each = ((b - a) / FURTHER for a, b in zip(few, more, strict=True))
    return Seconds(*(a + (layers - 1) * max(b, 0.0) for a, b in zip(one, each, strict=True)))


def _cut(raw: Mapping[str, Any], layers: int, vocab: int) -> dict[str, Any]:
    """The same with so many layers and tokens."""
    kinds = {"layer_types": raw["layer_types"][:1] * layers} if raw.get("layer_types") else {}
    return {**raw, "num_hidden_layers": layers, "vocab_size": vocab, **kinds}


def _seconds(raw: dict[str, Any], model: ModelConfig, work: Work) -> Seconds:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        small = model.model_copy(update={"path": folder, "init": "random"})
        return Seconds(*_engine(small, work), *_policy(small, work))


def _fastest(action: Callable[[], object]) -> float:
    times = []
    for _ in range(TURNS):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return min(times)


def _engine(model: ModelConfig, work: Work) -> tuple[float, float, float]:
    """Of a prompt's prefill, and a step of few and of all rows when their responses are half
    there.
    """
    # an engine with room for all rows
    architecture = Architecture.from_folder(model.path)
    engine = LocalEngine(
        architecture, work.groups * work.samples, dtype=getattr(torch, model.dtype)
    )
    engine.publish(RandomWeights(architecture, 0).items(), 0)

    def generate(groups: int, prompt: int, tokens: int) -> None:
        ids = np.random.default_rng(0).integers(0, architecture.vocab, (groups, prompt)).tolist()
        asked = [
            plain(Prompt(str(i), tuple(each), "", ""), work.samples, i)
            for i, each in enumerate(ids)
        ]
        for _ in engine.generate(asked, Sampling(1.0, 1.0, tokens, ())):
            pass

    # the first call warms up
    generate(work.groups, work.prompt, 1)
    prefill = _fastest(lambda: generate(work.groups, work.prompt, 1)) / work.groups
    few = _step(work, partial(generate, 1))
    return prefill, few, few if work.groups == 1 else _step(work, partial(generate, work.groups))


def _step(work: Work, generate: Callable[[int, int], None]) -> float:
    """Of a step in the middle of responses; `generate` takes what is known and how many tokens are
    drawn.
    """

    def behind(known: int) -> float:
        began, further = (_fastest(partial(generate, known, tokens)) for tokens in (2, 2 + STEPS))
        return max(further - began, 0.0) / STEPS

    half = work.response // 2
    middle = behind(work.prompt + half)
    if not work.beyond:
        return middle
    # attention's time grows with what is known, as it did up to there
    return middle + max(middle - behind(work.prompt), 0.0) * work.beyond / half


def _policy(model: ModelConfig, work: Work) -> tuple[float, float, float]:
    """Of a sequence's log-probs, its forward and backward pass, and what an update takes beside
    them.
    """
    length = work.prompt + work.response
    few = max(1, min(FEW, work.budget) // length)  # in one micro-batch
    many = few * TIMES
    with join_ranks(ParallelConfig(), seed=0) as ranks:
        policy = Policy(
            model, ParallelConfig(), OptimizerConfig(lr=1e-9), ranks, updates=1_000_000, seed=0
        )
        small, large = (_packed(policy, work, count) for count in (few, many))
        times = []
        for batches in (small, large):
            policy.score(batches)
            policy.update(batches, policy_loss(Objective()))
            times.append(
                (
                    _fastest(lambda batches=batches: policy.score(batches)),
                    _fastest(
                        lambda batches=batches: policy.update(batches, policy_loss(Objective()))
                    ),
                )
            )
    (score_few, train_few), (score_many, train_many) = times
    train = max(train_many - train_few, 0.0) / (many - few)
    return max(score_many - score_few, 0.0) / (many - few), train, max(train_few - few * train, 0.0)


def _packed(policy: Policy, work: Work, count: int) -> list[PackedBatch]:
    rng = np.random.default_rng(count)
    vocab = policy.architecture.vocab
    samples = [
        Sample(
            rng.integers(0, vocab, work.prompt + work.response),
            work.prompt,
            {"advantage": np.ones(work.response)},
        )
        for _ in range(count)
    ]
    return policy.pack_update(
        samples, list(range(count)), max(work.budget, work.prompt + work.response), "sequence"
    )
