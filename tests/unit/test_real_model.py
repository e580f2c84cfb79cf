"""The task of examples/real_model.sh: its sums come out, and the test's problems are its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.alike

STORIES = Path(__file__).parents[2] / "examples/real_model/stories.py"
NAMES = ("train", "test", "sums", "sft")


def write(folder: Path, seed: int) -> dict[str, list[dict[str, Any]]]:
    command = [sys.executable, STORIES, "--out", folder, "--seed", seed, "--test", 60]
    subprocess.run([str(part) for part in command], check=True)
    return {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in NAMES
    }


def computed(question: str) -> tuple[int, ...]:
    """The number at first and every change, read from the words alone."""
    first, *changes = re.findall(r"(has|buys|finds|gets|gives|loses|sells) (\d+)", question)
    assert first[0] == "has"
    signs = {word: 1 if word in ("buys", "finds", "gets") else -1 for word, _ in changes}
    return (int(first[1]), *(signs[word] * int(number) for word, number in changes))


def test_problems_and_solutions_come_out_and_the_test_is_held_out(tmp_path: Path) -> None:
    files = write(tmp_path / "one", seed=1)
    assert files != write(tmp_path / "other", seed=2)
    assert [len(files[name]) for name in NAMES] == [1024, 60, 50, 256]
    for row in files["train"] + files["test"]:
        found = computed(row["question"])
        assert (sum(found), len(found) - 1) == (int(row["answer"]), row["difficulty"])
        assert all(2 <= number <= 12 for number in found)
    assert [row["difficulty"] for row in files["test"]] == [1, 2] * 30
    known = {computed(row["question"]) for row in files["train"] + files["sft"]}
    assert not known & {computed(r["question"]) for r in files["test"] if r["difficulty"] == 2}
    kinds = []
    for row in files["sft"]:
        equations = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)\.", row["response"])
        for a, sign, b, c in equations:
            assert int(a) + (int(b) if sign == "+" else -int(b)) == int(c)
        found = computed(row["question"])
        assert min(sum(found[: i + 1]) for i in range(len(found))) >= 0
        answer = sum(found)
        assert row["response"].endswith(f" The answer is {answer}.")
        assert int(equations[-1][3]) == answer
        kinds.append(("check" in row["response"]) + row["response"][0].isalpha())
    assert all(60 <= kinds.count(kind) <= 110 for kind in (0, 1, 2))
    for row in files["sums"]:
        a, b = re.findall(r"\d+", row["question"])
        assert int(row["answer"]) == int(a) + int(b)
