"""The arithmetic task: chains add up, majorities, split, tokenizer, and the same bytes for the same
seed.
"""

import json
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from transformers import AutoConfig, AutoTokenizer, Qwen2ForCausalLM

from megatron_efr.config import DatasetConfig, PromptConfig, SftDataConfig
from megatron_efr.data import byte_model
from megatron_efr.data.arithmetic import (
    UNKNOWN,
    ArithmeticTask,
    attempt,
    majority,
    question,
    response,
    split,
    write,
)
from megatron_efr.data.datasets import load_problems
from megatron_efr.data.prompts import load_tokenizer, render_all
from megatron_efr.data.sft import load_sft
from megatron_efr.data.stop_tokens import stop_ids
from megatron_efr.grading import grade

SMALL = ArithmeticTask(train_rows=300, test_rows=512, sft_rows=400)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("arithmetic")
    write(place, seed=0, task=SMALL)
    return place


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_of(text: str) -> list[tuple[int, int, int]]:
    """(before, term, after) of each step of one attempt, read back from its text."""
    parts = re.findall(r"(?:^|=)(\d+)\+(\d)(?==(\d+))", text)
    return [(int(before), int(term), int(after)) for before, term, after in parts]


def test_chain_reads_as_running_sums() -> None:
    assert attempt((3, 5, 9), 0.0, random.Random(0)) == ("3+5=8+9=17", 17)


def test_uncorrupted_responses_are_right() -> None:
    task, rng = ArithmeticTask(corruption=0.0), random.Random(1)
    for _ in range(300):
        terms = tuple(rng.choices(range(1, 10), k=rng.randint(2, 8)))
        text = response(terms, task, rng)
        chain, box = text.rsplit("; \\boxed{", 1)
        assert box == f"{eval(question(terms))}}}"
        for one in chain.split("; wait "):
            steps = steps_of(one)
            assert len(steps) == len(terms) - 1
            assert all(before + term == after for before, term, after in steps)


def test_a_sign_behind_a_question_of_the_warm_start_says_how_much_is_rechecked(
    written: Path, tmp_path: Path
) -> None:
    """Behind the middle one as much as without signs; k rechecks are exp(2k) times as likely
    behind the next.
    """
    signs = ("}", "", "0")
    write(tmp_path, seed=0, task=replace(SMALL, signs=signs))
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()
    rechecks: dict[str, list[int]] = {sign: [] for sign in signs}
    for plain, signed in zip(
        rows(written / "sft.jsonl"), rows(tmp_path / "sft.jsonl"), strict=True
    ):
        sign = signed["question"].removeprefix(plain["question"])
        rechecks[sign].append(signed["response"].count(" wait "))
    usual = np.array(SMALL.recheck_weights)
    for place, sign in zip((-1, 0, 1), signs, strict=True):
        weights = usual * np.exp(2.0 * place * np.arange(4))
        found = np.bincount(rechecks[sign], minlength=4)
        assert scipy.stats.chisquare(found, found.sum() * weights / weights.sum()).pvalue > 0.01
    assert scipy.stats.chisquare([len(each) for each in rechecks.values()]).pvalue > 0.01


def test_corrupted_steps_are_five_in_a_hundred_and_carried_on(written: Path) -> None:
    steps = wrong = 0
    for row in rows(written / "sft.jsonl"):
        chain, box = row["response"].rsplit("; \\boxed{", 1)
        ends = []
        for one in chain.split("; wait "):
            found = steps_of(one)
            assert all(later[0] == sooner[2] for sooner, later in pairwise(found))
            assert [found[0][0], *(term for _, term, _ in found)] == [
                int(term) for term in row["question"].split("+")
            ]
            steps += len(found)
            wrong += sum(before + term != after for before, term, after in found)
            ends.append(found[-1][2])
        assert int(box.removesuffix("}")) == majority(ends)
    assert steps > 3000
    assert 0.035 < wrong / steps < 0.065


@pytest.mark.parametrize(
    ("results", "answer"),
    [
        ([5], 5),
        ([5, 6], 6),
        ([5, 6, 5], 5),
        ([6, 5, 5], 5),
        ([5, 6, 7], 7),
        ([5, 5, 6, 6], 6),
        ([6, 5, 5, 6], 6),
        ([5, 5, 6, 6, 7], 6),
    ],
)
def test_majority_with_ties_to_the_last(results: list[int], answer: int) -> None:
    assert majority(results) == answer


def test_rechecks_follow_their_weights() -> None:
    rng = random.Random(0)
    counts = Counter(response((3, 5), ArithmeticTask(), rng).count("wait") for _ in range(4000))
    for rechecks, share in enumerate((0.10, 0.30, 0.35, 0.25)):
        assert abs(counts[rechecks] / 4000 - share) < 0.03


def test_held_out_problems_are_distinct_and_nowhere_else() -> None:
    train, test, sft = split(ArithmeticTask(train_rows=3000, test_rows=700, sft_rows=3000), seed=4)
    assert len(test) == len(set(test)) == 700
    assert not set(test) & (set(train) | set(sft))
    levels = Counter(map(len, test))
    assert levels[2] == 16  # a fifth of the 81 sums of two digits
    assert all(levels[terms] >= 100 for terms in range(3, 9))
    assert set(map(len, train)) == set(range(2, 9))


def test_answers_and_difficulty_in_the_files(written: Path) -> None:
    for name, count in (("train", 300), ("test", 512)):
        problems = load_problems(DatasetConfig(path=str(written / f"{name}.jsonl")))
        assert len(problems) == count
        for problem in problems:
            assert int(problem.gold) == eval(problem.question)
            assert problem.difficulty == problem.question.count("+") + 1


def test_same_seed_same_bytes(written: Path, tmp_path: Path) -> None:
    write(tmp_path / "again", seed=0, task=SMALL)
    write(tmp_path / "other", seed=1, task=SMALL)
    files = sorted(str(path.relative_to(written)) for path in written.rglob("*") if path.is_file())
    assert {
        "train.jsonl",
        "test.jsonl",
        "sft.jsonl",
        "model/config.json",
        "model/tokenizer.json",
    } <= set(files)
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (written / file).read_bytes(), file
    for file in ("train.jsonl", "test.jsonl", "sft.jsonl"):
        assert (tmp_path / "other" / file).read_bytes() != (written / file).read_bytes()


def test_text_round_trips_and_math_verify_sees_the_box(written: Path) -> None:
    ours = load_tokenizer(written / "model")
    # what users of the trained folder call
    theirs = AutoTokenizer.from_pretrained(written / "model")
    sample = rows(written / "sft.jsonl")[:100]
    for row in sample:
        for text in (row["question"], row["response"]):
            ids = ours.encode(text, add_special_tokens=False)
            assert ours.decode(ids, skip_special_tokens=True) == text
            assert theirs.encode(text, add_special_tokens=False) == ids
            assert theirs.decode(ids, skip_special_tokens=True) == text
    text = "3+5=8+9=17; wait 3+5=8+9=17; \\boxed{17}"
    # two attempts, one wait, and the box with two digits
    assert len(ours.encode(text)) == 11 + 1 + 11 + 4
    assert grade([ours.decode(ours.encode(text))], ["17"])[0].correct


def test_sft_rows_through_the_prompt_path(written: Path) -> None:
    tokenizer = load_tokenizer(written / "model")
    config = PromptConfig(template="{question}", prefill="none")
    loaded = load_sft(SftDataConfig(path=str(written / "sft.jsonl")), tokenizer, config)
    assert len(loaded.samples) == 400
    first, sequence = rows(written / "sft.jsonl")[0], loaded.samples[0]
    assert (
        tokenizer.decode(sequence.tokens)
        == f"<bos><user>{first['question']}<assistant>{first['response']}<eos>"
    )
    unknown = tokenizer.convert_tokens_to_ids(UNKNOWN)
    assert not any(unknown in row.tokens for row in loaded.samples)
    assert unknown in tokenizer.encode("3*5")
    assert max(map(max, (row.tokens for row in loaded.samples))) < 32
    problems = load_problems(DatasetConfig(path=str(written / "test.jsonl")))
    assert render_all(problems, tokenizer, config).overlong == 0


def test_model_folder_builds_a_qwen2(written: Path) -> None:
    config = AutoConfig.from_pretrained(written / "model")
    model = Qwen2ForCausalLM(config)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (32, 64, 3)
    assert config.tie_word_embeddings
    assert 0.12e6 < sum(parameter.numel() for parameter in model.parameters()) < 0.2e6
    tokenizer = load_tokenizer(written / "model")
    assert (
        stop_ids(written / "model", tokenizer)
        == (tokenizer.eos_token_id,)
        == (config.eos_token_id,)
    )


def test_byte_tokenizer_round_trips_any_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["byte_model", "--out", str(tmp_path)])
    byte_model.main()
    tokenizer = load_tokenizer(tmp_path)
    text = "Résumé:\n\t$\\frac{1}{2}$  costs 5 €, 你好 🎉"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert AutoConfig.from_pretrained(tmp_path).vocab_size == 272 > len(tokenizer)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"min_terms": 1}, "2 <= min_terms"),
        ({"corruption": 1.0}, "corruption < 1"),
        ({"max_terms": 2, "test_rows": 512}, "only 16 test problems"),
    ],
)
def test_impossible_knobs(knobs: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ArithmeticTask(**knobs)  # pyright: ignore[reportArgumentType]
