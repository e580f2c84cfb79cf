"""The report on prose: which docstrings it names, and how it counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.words import main, prose, questions, report

pytestmark = pytest.mark.alike

ROOT = Path(__file__).parents[3]

SOURCE = '''"""What a module is."""

LIMIT = 3
"""Where it ends."""
"""Whatever."""


class Thing:
    """Whether it is a class's."""

    size: int
    """Size, where known."""

    def method(self) -> str:
        """True if it holds."""
        text = """What is no docstring"""
        return text  # where a comment counts
'''


def test_docstrings_of_modules_constants_classes_fields_and_functions_are_found() -> None:
    assert prose(SOURCE).docstrings == [
        (1, "What a module is."),
        (4, "Where it ends."),
        (9, "Whether it is a class's."),
        (12, "Size, where known."),
        (15, "True if it holds."),
    ]
    assert [word for word in prose(SOURCE).words if word.lower() == "where"] == [
        "Where",
        "where",
        "where",
    ]


def test_the_report_names_the_line_and_the_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "module.py"
    path.write_text(SOURCE + "# " + "word " * 300)
    lines = list(report(path))
    assert [line.removeprefix(f"{path}:") for line in lines[:3]] == [
        "1: What a module is.",
        "4: Where it ends.",
        "9: Whether it is a class's.",
    ]
    words = len(prose(path.read_text()).words)
    assert lines[3:] == [f"{path}: {3000 / words:.1f} where in 1,000 words"]
    main([str(tmp_path), "--total"])
    printed = capsys.readouterr().out
    assert printed.endswith("; 1 files say where more than 2 times in 1,000 words\n")
    assert printed.startswith("words: 3 docstrings begin with What, Where, Whether, ")


@pytest.mark.parametrize("folder", ["megatron_efr", "tools"])
def test_docstrings_begin_with_the_thing_or_the_act(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {first}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, first in questions(prose(path.read_text(encoding="utf-8")))
    ]
    assert found == []
