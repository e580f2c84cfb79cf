"""Fixtures of all tests: one thread, tiny Qwen2 folders, ragged sequences, and a world of one
rank.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_efr import log
from megatron_efr.config import ParallelConfig
from megatron_efr.policy.ranks import Ranks, join_ranks
from megatron_efr.samples import Sample
from tests.groups import sample

torch.set_num_threads(1)

VOCAB = 61


@pytest.fixture(autouse=True)
def _log_of_a_program() -> None:
    """The terminal's log as programs begin with it: one that a test ran in this process may have
    asked for less.
    """
    os.environ.pop(log.VARIABLE, None)
    log.to_terminal()


@pytest.fixture
def without_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's operations alone, as with more threads or without Numba."""
    monkeypatch.setattr("megatron_efr.compiled._loops", lambda: None)


@pytest.fixture(params=["loops", "torch"])
def either_way(request: pytest.FixtureRequest) -> None:
    """By compiled loops, and by torch's operations alone."""
    if request.param == "torch":
        request.getfixturevalue("without_loops")


def make_model_folder(
    folder: Path,
    *,
    tied: bool,
    seed: int = 0,
    vocab: int = VOCAB,
    dtype: torch.dtype = torch.float32,
    hidden: int = 64,
) -> Path:
    """A Qwen2 of 4 layers with lively random weights (biases and norms too), as `transformers`
    writes it.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        tie_word_embeddings=tied,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    model.to(dtype).save_pretrained(folder)
    return folder


def ragged_sequences(
    count: int, seed: int = 0, shortest: int = 8, longest: int = 90
) -> list[Sample]:
    """Random prompts and responses of very different lengths."""
    rng = np.random.default_rng(seed)
    sequences = []
    for _ in range(count):
        tokens = rng.integers(0, VOCAB, int(rng.integers(shortest, longest))).tolist()
        prompt = int(rng.integers(1, shortest - 1))
        logprobs = (-rng.random(len(tokens) - prompt)).tolist()
        sequences.append(
            sample(tokens, prompt, advantage=float(rng.normal()), engine_logprob=logprobs)
        )
    return sequences


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """A world of one rank, on the CPU."""
    with join_ranks(ParallelConfig(), seed=0) as world:
        yield world


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "tied", tied=True)


@pytest.fixture(scope="session")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "untied", tied=False)
