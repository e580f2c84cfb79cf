"""The docs' code, configurations and quoted error messages are those of the source."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_efr.config import RolloutConfig, TrainConfig
from megatron_efr.config.file import validate
from megatron_efr.config.yaml_text import parse
from megatron_efr.methods.plain import Outcomes

pytestmark = pytest.mark.alike

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
OTHERS = {
    "No space left on device",
    "groups_without_signal",
    "\\boxed{}",
    "truncated",
    "stuck",
}  # not our errors' words


def blocks(page: str, begins: str) -> list[str]:
    """The indented blocks of a page whose first line begins so, without the indent."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(r"(?:^(?: {4,}.*)?\n)+", text, re.MULTILINE)
    return [
        block for each in found if (block := textwrap.dedent(each).strip("\n")).startswith(begins)
    ]


def texts() -> list[str]:
    """Every text in the package's source, with a line break for what a format string fills in."""
    found = []
    for path in (ROOT / "megatron_efr").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(
                        str(v.value) if isinstance(v, ast.Constant) else "\n" for v in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_error_that_troubleshooting_quotes_is_one_that_the_source_has() -> None:
    rows = re.findall(
        r"^\| (.+?) \|", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    quoted = {quote for row in rows for quote in re.findall(r"`([^`]+)`", row)} - OTHERS
    source = texts()
    assert len(quoted) > 30

    def said(quote: str) -> bool:
        pattern = re.compile(".*".join(map(re.escape, quote.split("..."))), re.DOTALL)
        return any(pattern.search(text) for text in source)

    assert [quote for quote in sorted(quoted) if not said(quote)] == []


def run(block: str) -> dict[str, Any]:
    """The names that a block of Python defines, its entry points left aside."""
    names: dict[str, Any] = {}
    exec(block.partition("\n[project.")[0], names)
    return names


def test_the_example_of_a_method_gives_its_rewards() -> None:
    [block] = blocks("extending.md", "from pydantic")
    right, cut = np.array([True, True, False]), np.zeros(3, dtype=bool)
    group = Outcomes(right, np.array([400.0, 600.0, 100.0]), cut, ~cut, 1000)
    assert run(block)["Halved"](target=500).rule(group).tolist() == [1.0, 0.5, 0.0]


def test_the_example_of_an_algorithm_has_its_objective() -> None:
    [block] = blocks("extending.md", "from megatron_efr.algorithms")
    objective = run(block)["Calm"]().objective(RolloutConfig())
    assert (objective.low, objective.high, objective.kl) == (0.1, 0.1, "none")


def test_the_configuration_of_a_small_real_model_is_valid() -> None:
    [block] = blocks("real-models.md", "name: small")
    config = validate(TrainConfig, parse(block, "page"))
    assert config.data.prompt.template.format(question="2 + 3?") == (
        "2 + 3? Give the final answer within \\boxed{}."
    )
