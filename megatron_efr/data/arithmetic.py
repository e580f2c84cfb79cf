"""The quickstart's task: sums with wordy chains of thought that recheck themselves, and a tiny
model to learn it.

    python -m megatron_efr.data.arithmetic --out runs/arithmetic --seed 0

writes train.jsonl and test.jsonl (question, answer, difficulty), sft.jsonl (question, response) and
model/. A response adds the terms up one by one, sometimes wrongly, waits and does it all again up
to three times, and answers with what most attempts found:

    2+9+5  ->  2+9=11+5=16; wait 2+9=11+5=17; wait 2+9=11+5=16; \\boxed{16}

Rechecking pays only because steps go wrong: a model that learns to add well has no more use for it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megatron_efr.data.model_folder import (
    ASSISTANT,
    BOS,
    EOS,
    PAD,
    SYSTEM,
    USER,
    ModelSize,
    special_tokens,
    write_model_folder,
)

WAIT, BOX, CLOSE, UNKNOWN = " wait ", " \\boxed{", "}", "<unknown>"


@dataclass(frozen=True, slots=True)
class ArithmeticTask:
    """The knobs. A problem is the sum of `min_terms` to `max_terms` digits 1-9; its difficulty is
    how many terms.
    """

    min_terms: int = 2
    max_terms: int = 8
    recheck_weights: tuple[float, ...] = (0.10, 0.30, 0.35, 0.25)  # of 0, 1, 2, ... rechecks
    corruption: float = 0.05  # chance that a step's sum is off
    train_rows: int = 8_192
    test_rows: int = 1_024
    sft_rows: int = 64_000  # 1,500 updates of 64 see each one and a half times
    held_out: float = 0.2  # at most this share of a difficulty's problems is kept for the test
    # behind each question of sft.jsonl stands one of these, from the fewest rechecks to the most
    signs: tuple[str, ...] = ()
    tilt: float = 2.0  # each place further on, k rechecks are exp(tilt * k) times as likely
    model: ModelSize = field(default_factory=ModelSize)

    def __post_init__(self) -> None:
        if not 2 <= self.min_terms <= self.max_terms:
            raise ValueError(
                f"need 2 <= min_terms <= max_terms, got {self.min_terms} and {self.max_terms}"
            )
        if (
            not 0 <= self.corruption < 1
            or not 0 < self.held_out < 1
            or sum(self.recheck_weights) <= 0
        ):
            raise ValueError(
                "need 0 <= corruption < 1, 0 < held_out < 1 and some weight on a number of rechecks"
            )
        if (available := sum(_quotas(self))) < self.test_rows:
            raise ValueError(
                f"only {available} test problems can be held out, {self.test_rows} are asked for"
            )


Terms = tuple[int, ...]


def question(terms: Sequence[int]) -> str:
    """The problem as text, such as `3+5+9`."""
    return "+".join(map(str, terms))


def attempt(terms: Sequence[int], corruption: float, rng: random.Random) -> tuple[str, int]:
    """One pass of running sums, `3+5=8+9=17`, and its last sum; a corrupted step is carried on."""
    total = terms[0]
    steps = [str(terms[0])]
    for term in terms[1:]:
        total += term
        if rng.random() < corruption:
            total = max(1, total + rng.choice((-2, -1, 1, 2)))
        steps.append(f"+{term}={total}")
    return "".join(steps), total


def majority(results: Sequence[int]) -> int:
    """The most frequent result; of several, the one that came last."""
    counts = Counter(results)
    most = max(counts.values())
    return next(result for result in reversed(results) if counts[result] == most)


def response(terms: Sequence[int], task: ArithmeticTask, rng: random.Random) -> str:
    """A chain of thought and the boxed answer, which the corrupted steps may have made wrong."""
    [rechecks] = rng.choices(range(len(task.recheck_weights)), task.recheck_weights)
    attempts = [attempt(terms, task.corruption, rng) for _ in range(rechecks + 1)]
    chain = WAIT.join(text + ";" for text, _ in attempts)
    return f"{chain}{BOX}{majority([result for _, result in attempts])}{CLOSE}"


def _quotas(task: ArithmeticTask) -> list[int]:
    """Test problems of each difficulty: even shares, as far as the few short problems allow."""
    quotas = []
    left = task.test_rows
    sizes = range(task.min_terms, task.max_terms + 1)
    for remaining, terms in zip(range(len(sizes), 0, -1), sizes, strict=True):
        quotas.append(min(-(-left // remaining), int(task.held_out * 9**terms)))
        left -= quotas[-1]
    return quotas


def split(task: ArithmeticTask, seed: int) -> tuple[list[Terms], list[Terms], list[Terms]]:
    """(train, test, sft) problems. Test problems are distinct and appear nowhere else; the others
    may repeat.
    """
    rng = random.Random(f"{seed}/test")
    test: dict[Terms, None] = {}
    for terms, quota in enumerate(_quotas(task), start=task.min_terms):
        wanted = len(test) + quota
        while len(test) < wanted:
            test.setdefault(_draw(terms, rng))
    held_out = list(test)
    rng.shuffle(held_out)

    def others(count: int, stream: str) -> list[Terms]:
        rng = random.Random(f"{seed}/{stream}")
        problems = []
        while len(problems) < count:
            terms = _draw(rng.randint(task.min_terms, task.max_terms), rng)
            if terms not in test:
                problems.append(terms)
        return problems

    return others(task.train_rows, "train"), held_out, others(task.sft_rows, "sft")


def _draw(terms: int, rng: random.Random) -> Terms:
    return tuple(rng.choices(range(1, 10), k=terms))


def arithmetic_tokenizer() -> Tokenizer:
    """One token per digit, sign and word, the words with their spaces, so that text round-trips
    exactly.

    Single characters are a byte-level BPE without merges and the words are added tokens, found
    before any splitting: transformers' AutoTokenizer puts its own splitting into every Qwen2
    folder, and this survives that.
    """
    vocab = {char: index for index, char in enumerate([UNKNOWN, *"0123456789+=;", CLOSE])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special_tokens([UNKNOWN, PAD, BOS, EOS, SYSTEM, USER, ASSISTANT]))
    backend.add_tokens([AddedToken(word, normalized=False) for word in (WAIT, BOX)])
    return backend


def write(out: Path, seed: int, task: ArithmeticTask | None = None) -> None:
    """Write the task's files and the model folder under `out`; the bytes depend on (seed, task)
    alone.
    """
    task = task or ArithmeticTask()
    out.mkdir(parents=True, exist_ok=True)
    train, test, sft = split(task, seed)
    _write_rows(out / "train.jsonl", map(_problem_row, train))
    _write_rows(out / "test.jsonl", map(_problem_row, test))
    _write_rows(out / "sft.jsonl", _sft_rows(sft, task, random.Random(f"{seed}/responses")))
    write_model_folder(out / "model", arithmetic_tokenizer(), task.model)


def _sft_rows(
    problems: Iterable[Terms], task: ArithmeticTask, rng: random.Random
) -> Iterator[dict[str, str | int]]:
    """Questions, each with one of the task's signs if it has any, and responses as these ask."""
    told = [(sign, _tilted(task, place)) for place, sign in enumerate(task.signs)] or [("", task)]
    for terms in problems:
        # one that is told nothing draws nothing
        sign, asked = rng.choice(told) if task.signs else told[0]
        yield {"question": question(terms) + sign, "response": response(terms, asked, rng)}


def _tilted(task: ArithmeticTask, place: int) -> ArithmeticTask:
    """The task with rechecks as likely as its sign at `place` asks; the middle one leaves them."""
    tilt = task.tilt * (place - (len(task.signs) - 1) / 2)
    weights = (math.exp(tilt * k) * weight for k, weight in enumerate(task.recheck_weights))
    return replace(task, recheck_weights=tuple(weights))


def _problem_row(terms: Terms) -> dict[str, str | int]:
    return {"question": question(terms), "answer": str(sum(terms)), "difficulty": len(terms)}


def _write_rows(path: Path, rows: Iterable[dict[str, str | int]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    """Write the files under --out."""
    parser = argparse.ArgumentParser(
        description="Write the quickstart's arithmetic task and its tiny model."
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the data files and model/"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--signs",
        nargs="+",
        default=[],
        metavar="SIGN",
        help="of which one stands behind each question of sft.jsonl: the first asks for the fewest "
        "rechecks, the last for the most",
    )
    arguments = parser.parse_args()
    task = ArithmeticTask(signs=tuple(arguments.signs))
    write(arguments.out, arguments.seed, task)
    print(
        f"{arguments.out}: {task.train_rows} train, {task.test_rows} test, {task.sft_rows} sft "
        "rows, and model/"
    )


if __name__ == "__main__":
    main()
