"""Groups with notes and texts, as methods judge them, and what they give."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_efr import methods
from megatron_efr.config import AlgorithmConfig, MethodConfig, RolloutConfig
from megatron_efr.methods import Known, Method, Visit
from megatron_efr.steps import Draw, Fork, Part
from megatron_efr.types import (
    Branch,
    Done,
    Finish,
    Grade,
    Graded,
    Prompt,
    Response,
    Rewarded,
    Script,
)
from tests.groups import KNOWN, graded, response

VECTORS = json.loads((Path(__file__).parent / "data/method_vectors.json").read_text())
C, L = [1, 0, 1, 1], [300, 900, 500, 120]
NOTE = {"budget": 400, "exact": True, "level": "low"}
"""Note that methods which tell a budget find again, beside the answers."""
REQUIRED: dict[str, dict[str, Any]] = {"efr": {"alpha": 0.2}, "gfpo": {"keep": 2}}
"""Options without which a method cannot be built for groups of four."""


def build(
    name: str, samples: int = 4, tokens: int = 40_000, prompts: int = 32, **options: Any
) -> Method:
    config = MethodConfig.model_validate({"name": name, **REQUIRED.get(name, {}), **options})
    rollout = RolloutConfig(prompts=prompts, samples=samples, max_new_tokens=tokens)
    return methods.build(config, rollout, AlgorithmConfig())


def asked(
    right: Sequence[Any],
    lengths: Sequence[int],
    finish: Sequence[Finish] | None = None,
    note: Mapping[str, Any] = NOTE,
    texts: Sequence[str] = ("",),
) -> Graded:
    """A group with a note, and texts one after the other; no token comes twice in a response."""
    made = graded(right, lengths, finish)
    said = [
        replace(each, text=texts[i % len(texts)], tokens=tuple(range(each.length)))
        for i, each in enumerate(made.group.responses)
    ]
    return replace(made, group=replace(made.group, responses=tuple(said), note=note))


def branched(
    group: Graded, method: Method, verdicts: Sequence[Sequence[Any]] | None = None
) -> Graded:
    """The group with the branches that `method` asks for, of responses that are all thought but for
    an end mark.

    `verdicts` say for each response which answers of branches are right; None: drawn, by its own
    length and verdict.
    """
    visit = Visit(group.group.prompt, len(group.grades), seed=5)
    scripts = method.ask(visit, KNOWN).scripts
    pairs = zip(scripts, group.group.responses, strict=True)
    responses = tuple(followed(script, sample, each) for sample, (script, each) in enumerate(pairs))
    if verdicts is None:
        sizes = zip(responses, group.grades, strict=True)
        rngs = [
            (np.random.default_rng([len(each.tokens), grade.correct]), len(each.answers))
            for each, grade in sizes
        ]
        verdicts = [(rng.random(count) < 0.5).tolist() for rng, count in rngs]
    judged = tuple(
        tuple(Grade("correct" if right else "wrong") for right in each) for each in verdicts
    )
    return replace(group, group=replace(group.group, responses=responses), branches=judged)


def followed(script: Script, sample: int, whole: Response) -> Response:
    """A response as its script has it, if its thought is all but its last token."""
    steps, parts, branches, length = script.steps(sample), [], [], len(whole.tokens)
    step: Any = next(steps)
    while step is not None:
        done = Done(Part(step.part, length, length, "forced"))
        if isinstance(step, Draw):
            thinks = not parts
            end = min(length - 1, step.limit or length) if thinks else length
            cut = thinks and end == step.limit
            parts.append(
                Part(
                    step.part,
                    parts[-1].end if parts else 0,
                    end,
                    "length" if cut else "until" if thinks else "stop",
                )
            )
            done = Done(parts[-1])
        elif isinstance(step, Fork):
            made = [
                Branch(step.part, at, tuple(response(step.limit) for _ in range(step.samples)))
                for at in step.at
            ]
            branches += made
            done = done._replace(branches=tuple(made))
        try:
            step = steps.send(done)
        except StopIteration:
            step = None
    return replace(whole, parts=tuple(parts), branches=tuple(branches))


def rewarded(
    method: Method,
    groups: Sequence[tuple[Sequence[Any], Sequence[int]]],
    known: Known = KNOWN,
    finish: Sequence[Finish] | None = None,
    **changed: Any,
) -> list[Rewarded]:
    """An iteration's groups with the rewards that count."""
    judged = [asked(right, lengths, finish, **changed) for right, lengths in groups]
    if method.needs.branches:
        judged = [branched(group, method) for group in judged]
    return list(method.settle([methods.reward(method, group, known) for group in judged], known))


def early_steps(prompt: Prompt, steps: Sequence[str]) -> list[float]:
    """A judge that holds the first steps of a thought right, of a number that the prompt and the
    thought decide.
    """
    right = (len(prompt.text) + len("".join(steps))) % (len(steps) + 1)
    return [float(number < right) for number in range(len(steps))]


def trained_on(
    method: Method,
    right: Sequence[Any],
    lengths: Sequence[int],
    known: Known = KNOWN,
    **changed: Any,
) -> np.ndarray:
    """A group's advantages if the method gives them, else its rewards."""
    groups = rewarded(method, [(right, lengths)], known, **changed)
    credits = method.credits(groups, known)
    return groups[0].rewards if credits is None else credits[0].advantage


def close(values: Any) -> Any:
    return pytest.approx(np.asarray(values, dtype=np.float64), abs=6e-5)


def outputs(name: str) -> dict[str, Any]:
    return VECTORS[name]["outputs"]


def drawn_groups(seed: int, count: int) -> list[tuple[list[int], list[int]]]:
    """Groups of 2 to 12 responses of 1 to 39,999 tokens, some of few lengths, of every accuracy."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        n = int(rng.integers(2, 13))
        longest = int(rng.choice([5, 300, 5000, 39_999], p=[0.3, 0.35, 0.3, 0.05]))
        right = rng.random(n) < rng.choice([0.1, 0.5, 0.9])
        lengths = rng.integers(1, longest + 1, n)
        if longest == 39_999:
            lengths[0] = 39_990  # within a few tokens of the limit
        made.append((right.astype(int).tolist(), lengths.tolist()))
    return made
