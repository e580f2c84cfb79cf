"""The paper's offline baselines: which answers are learnt from, and DPO's loss and gradient against
fp64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from transformers import Qwen2ForCausalLM

from megatron_efr import dpo, sft
from megatron_efr.config import (
    ConfigError,
    DpoConfig,
    OptimizerConfig,
    SftConfig,
)
from megatron_efr.data.readers import DatasetError
from megatron_efr.offline import answers
from megatron_efr.offline.loop import schedule
from megatron_efr.offline.preferences import PreferenceUpdate
from megatron_efr.policy import Ranks, supervised_loss
from megatron_efr.rollout.group_json import decode_graded, encode_graded
from megatron_efr.samples import Sample
from megatron_efr.types import Grade, Graded, Group, Prompt, Response, UserError
from megatron_efr.weights.architecture import Architecture
from tests.conftest import ragged_sequences
from tests.policies import make_policy


def graded(name: str, *responses: tuple[int, bool]) -> Graded:
    """A group whose responses have these lengths, right or wrong, and tokens that tell them
    apart.
    """
    number = int(name[1:])
    made = tuple(
        Response((*[20 + place] * (length - 1), 2), np.zeros(length, np.float32), "stop")
        for place, (length, _) in enumerate(responses)
    )
    grades = tuple(Grade("correct" if right else "wrong") for _, right in responses)
    return Graded(Group(Prompt(name, (5, 6 + number), "", "1"), made), grades)


def write(path: Path, *groups: Graded) -> str:
    text = "".join(encode_graded(group) + "\n" for group in groups)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.compress(text.encode()))
    return str(path)


@pytest.fixture
def kept(tmp_path: Path) -> str:
    """Two files of rollouts, with a prompt that is visited twice."""
    folder = tmp_path / "rollouts"
    write(
        folder / "step_000001.jsonl.zst",
        graded("p0", (9, True), (4, False), (7, True), (7, True)),
        graded("p1", (5, False)),
    )
    write(
        folder / "step_000002.jsonl.zst",
        graded("p2", (6, True), (6, True)),
        graded("p0", (8, True), (12, True)),
    )
    return str(folder)


def shape(samples: list[Sample]) -> list[tuple[int, int, int]]:
    """Of each sample: the prompt's last token, which response it was, and its length."""
    return [(int(s.tokens[1]), int(s.tokens[2]), s.response_length) for s in samples]


def test_the_shortest_right_answer_of_all_visits_is_learnt_from(kept: str) -> None:
    assert shape(answers.shortest(kept, 100)) == [(6, 22, 7), (8, 20, 6)]
    assert shape(answers.shortest(kept, 100, limit=1)) == [(6, 22, 7)]
    assert [length for *_, length in shape(answers.every_right(kept, 100))] == [
        7,
        7,
        8,
        9,
        12,
        6,
        6,
    ]
    assert shape(answers.shortest(f"{kept}/step_000002.jsonl.zst", 100)) == [(8, 20, 6), (6, 20, 8)]


def test_pairs_are_the_shortest_and_the_longest_right_answer(kept: str) -> None:
    """A prompt whose right answers are all alike long makes none."""
    assert shape(answers.pairs(kept, 100)) == [(6, 22, 7), (6, 21, 12)]


def test_answers_that_cannot_be_learnt_from_are_named(
    kept: str, tied_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        DatasetError,
        match=r"absent\.jsonl\.zst: no such file; a run keeps its answers in rollouts/",
    ):
        answers.shortest(str(tmp_path / "absent.jsonl.zst"), 100)
    damaged = tmp_path / "damaged.jsonl.zst"
    damaged.write_bytes(b"no")
    with pytest.raises(UserError, match=r"damaged\.jsonl\.zst: damaged rollouts"):
        answers.pairs(str(damaged), 100)
    with pytest.raises(
        UserError,
        match="prompt p0: prompt and response have 14 tokens, and the model has 10 positions",
    ):
        answers.pairs(kept, 10)
    architecture = Architecture.from_folder(tied_model)
    tree: dict[str, Any] = {
        "name": "x",
        "model": {"path": str(tied_model)},
        "data": {"path": kept},
        "optimizer": {"lr": 1.0},
    }
    with pytest.raises(
        ConfigError, match=r"rollouts: 1 prompts with two right answers of different lengths"
    ):
        dpo.load_pairs(
            DpoConfig.model_validate(tree | {"train": {"updates": 1, "batch": 2}}), architecture
        )
    shortest = SftConfig.model_validate(tree | {"train": {"updates": 1, "batch": 2}})
    assert len(sft.load_rows(shortest, architecture)) == 2
    right = tree | {"data": {"path": kept, "pick": "right"}, "train": {"updates": 1, "batch": 7}}
    assert len(sft.load_rows(SftConfig.model_validate(right), architecture)) == 7


def test_graded_groups_are_written_and_read_again() -> None:
    group = graded("p3", (5, True), (3, False))
    again = decode_graded(encode_graded(group))
    assert again.correct.tolist() == [True, False]
    assert [each.tokens for each in again.group.responses] == [
        each.tokens for each in group.group.responses
    ]


def test_the_samples_of_a_pair_stay_together_and_every_pair_is_used_once_in_an_epoch() -> None:
    config = DpoConfig.model_validate(
        {
            "name": "x",
            "model": {"path": "x"},
            "data": {"path": "x"},
            "optimizer": {"lr": 1.0},
            "train": {"updates": 4, "batch": 3, "bucket": 2},
        }
    )
    updates = list(schedule(ragged_sequences(24), config, 2))
    assert [len(update) for update in updates] == [6] * 4
    assert all(
        one % 2 == 0 and other == one + 1
        for update in updates
        for one, other in zip(update[::2], update[1::2], strict=True)
    )
    assert sorted(i for update in updates for i in update) == list(range(24))


def exact_sum(model: Qwen2ForCausalLM, sample: Sample) -> torch.Tensor:
    logits = model(torch.tensor(sample.tokens)[None].long()).logits[
        0, sample.prompt_length - 1 : -1
    ]
    targets = torch.tensor(sample.tokens[sample.prompt_length :]).long()
    return torch.log_softmax(logits, -1).gather(1, targets[:, None]).sum()


def test_loss_and_gradient_are_those_of_fp64(tied_model: Path, ranks: Ranks) -> None:
    beta, samples = 0.3, ragged_sequences(12)
    optimizer = OptimizerConfig(
        lr=0.5, clip_grad=0.0, megatron={"optimizer": "sgd", "sgd_momentum": 0.0}
    )
    policy = make_policy(tied_model, ranks, optimizer=optimizer, updates=10, keep_reference=True)
    # away from the reference
    policy.update(policy.pack_update(samples, [0, 3, 5, 6], 400, "token"), supervised_loss)
    moved, start = (Qwen2ForCausalLM.from_pretrained(tied_model).double() for _ in range(2))
    with torch.no_grad():
        for name, tensor in policy.named_weights():
            moved.get_parameter(name).copy_(tensor)
    update = [4, 5, 0, 1, 10, 11]
    with torch.no_grad():
        gains = [exact_sum(start, samples[i]) for i in update]
    gains = [exact_sum(moved, samples[i]) - gain for i, gain in zip(update, gains, strict=True)]
    margins = beta * torch.stack(
        [one - other for one, other in zip(gains[::2], gains[1::2], strict=True)]
    )
    loss = -torch.nn.functional.logsigmoid(margins).mean()
    loss.backward()
    metrics = PreferenceUpdate(beta, micro_batch_tokens=200)(policy, samples, update)
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["margin"] == pytest.approx(margins.mean().item(), abs=1e-4)
    assert metrics["preferred"] == pytest.approx((margins > 0).double().mean().item())
    assert margins.abs().min() > 1e-2, "at the reference every margin is 0"
    for name, gradient in policy.named_gradients():
        exact = moved.get_parameter(name).grad
        assert exact is not None
        assert float((gradient - exact).abs().max()) <= 1e-5 * max(1.0, float(exact.abs().max())), (
            name
        )
