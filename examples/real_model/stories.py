"""The task of real_model.sh: word problems of one or two steps, sums in words, and worked
solutions.

    python examples/real_model/stories.py --out FOLDER --seed 1

writes sft.jsonl (question, response), train.jsonl and test.jsonl (question, answer, difficulty: how
many steps) and sums.jsonl (question, answer: a way of asking that training never shows). Worked
solutions add and subtract numbers up to 30. The problems of train and test only add, up to 12: a
model of 135 million parameters subtracts badly after so few examples, and what it hardly ever gets
right has no reward to learn from. A solution is the equations alone, or a sentence for each, or
those and a check of all equations:

    12 + 7 = 19. 19 - 5 = 14. The answer is 14.

Every solution is right, so that the check finds nothing: a model needs it only where it miscounts.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Irene", "Jack")
THINGS = ("apples", "books", "cards", "coins", "eggs", "keys", "marbles", "pens", "shells")
GAINS = ("buys {n} more", "finds {n} more", "gets {n} more")
LOSSES = ("gives {n} away", "loses {n}", "sells {n}")
SOLUTIONS = ("brief", "told", "checked")
SMALLEST, LARGEST, LARGEST_ASKED = 2, 30, 12


class Step(NamedTuple):
    """A change of a number: its words, the number before, the change and the number after."""

    words: str
    before: int
    change: int

    @property
    def after(self) -> int:
        return self.before + self.change

    @property
    def equation(self) -> str:
        """Such as `12 + 7 = 19`."""
        sign = "+" if self.change > 0 else "-"
        return f"{self.before} {sign} {abs(self.change)} = {self.after}"


class Story(NamedTuple):
    """Somebody has things, and one or two steps change how many."""

    name: str
    things: str
    steps: tuple[Step, ...]

    @property
    def question(self) -> str:
        *others, last = (step.words for step in self.steps)
        told = "".join(f", {words}" for words in others) + f" and {last}"
        has = f"{self.name} has {self.steps[0].before} {self.things}"
        return f"{has}{told}. How many {self.things} does {self.name} have?"

    @property
    def answer(self) -> int:
        return self.steps[-1].after

    def solution(self, kind: str) -> str:
        """A right solution, of a kind of SOLUTIONS."""
        equations = " ".join(f"{step.equation}." for step in self.steps)
        if kind == "brief":
            return f"{equations} The answer is {self.answer}."
        begins = f"{self.name} has {self.steps[0].before} {self.things}."
        told = " ".join(f"{self.name} {step.words}: {step.equation}." for step in self.steps)
        check = f" Let me check: {equations} That is right." if kind == "checked" else ""
        return f"{begins} {told}{check} The answer is {self.answer}."


def draw(rng: random.Random, steps: int, largest: int = LARGEST, losses: bool = True) -> Story:
    """A story of so many steps; nobody ever has fewer than none."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    made: list[Step] = []
    held = rng.randint(SMALLEST, largest)
    for _ in range(steps):
        gains = not losses or held <= SMALLEST or rng.random() < 0.5
        number = rng.randint(SMALLEST, largest if gains else min(held, largest))
        words = rng.choice(GAINS if gains else LOSSES).format(n=number)
        made.append(Step(words, held, number if gains else -number))
        held = made[-1].after
    return Story(name, things, tuple(made))


def asked(rng: random.Random, steps: int) -> Story:
    """A story of those that are asked: small numbers, which only grow."""
    return draw(rng, steps, LARGEST_ASKED, losses=False)


def numbers(story: Story) -> tuple[int, ...]:
    """The sum to compute, whoever has the things: the first number and the changes."""
    return (story.steps[0].before, *(step.change for step in story.steps))


def write(out: Path, seed: int, train: int, test: int, sums: int, sft: int) -> None:
    """Write so many rows of each file; the bytes depend on the arguments alone.

    Of the test's problems of two steps none is computed anywhere else; of one step there are too
    few for that.
    """
    out.mkdir(parents=True, exist_ok=True)
    # drawn first, so that nothing else may hold a problem of two steps that is asked here
    rng = random.Random(f"{seed}/test")
    held_out = [asked(rng, 1 + i % 2) for i in range(test)]
    kept = {numbers(story) for story in held_out if len(story.steps) > 1}

    # rows of the other files: their problems of one step may come twice, there are too few
    def others(
        count: int, stream: str, source: Callable[[random.Random, int], Story]
    ) -> list[Story]:
        rng = random.Random(f"{seed}/{stream}")
        drawn: list[Story] = []
        while len(drawn) < count:
            story = source(rng, rng.randint(1, 2))
            if numbers(story) not in kept:
                drawn.append(story)
        return drawn

    # problems to be trained on, and solutions that show how one is written
    _write(out / "test.jsonl", map(_problem, held_out))
    _write(out / "train.jsonl", map(_problem, others(train, "train", asked)))
    rng = random.Random(f"{seed}/solutions")
    _write(
        out / "sft.jsonl",
        (
            {"question": story.question, "response": story.solution(rng.choice(SOLUTIONS))}
            for story in others(sft, "sft", draw)
        ),
    )
    # bare sums: what every step of a story comes down to
    rng = random.Random(f"{seed}/sums")
    pairs = [(rng.randint(SMALLEST, LARGEST), rng.randint(SMALLEST, LARGEST)) for _ in range(sums)]
    _write(
        out / "sums.jsonl",
        ({"question": f"What is {a} plus {b}?", "answer": str(a + b)} for a, b in pairs),
    )


def _problem(story: Story) -> dict[str, str | int]:
    return {
        "question": story.question,
        "answer": str(story.answer),
        "difficulty": len(story.steps),
    }


def _write(path: Path, rows: Iterable[dict[str, str | int]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    """Write the files under --out."""
    parser = argparse.ArgumentParser(description="Write the word problems of real_model.sh.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the data files")
    parser.add_argument("--seed", type=int, default=1)
    for name, rows in (("train", 1024), ("test", 200), ("sums", 50), ("sft", 256)):
        parser.add_argument(f"--{name}", type=int, default=rows, help=f"rows of {name}.jsonl")
    given = parser.parse_args()
    write(given.out, given.seed, given.train, given.test, given.sums, given.sft)


if __name__ == "__main__":
    main()
