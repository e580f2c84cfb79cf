"""The table of source trees: what is counted in a tree of three files, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.measure_tree import Size, main, measure, prose

pytestmark = pytest.mark.alike

SOURCE = '''"""A module."""

import os  # 1 of 9 statements

# a line of its own
LIMIT = 3


class Thing:
    """A class."""

    def short(self) -> int:
        """Give a number."""
        return LIMIT

    async def long(self) -> str:

        if os.name:
            text = "# no comment"
        return text
'''
README = """# Title of four words

One paragraph of
five words.

| a | table |
|---|---|

    code that is no paragraph at all, and rather long

```
nor is this one, whatever its length may be
```

- A list of items
"""


def test_statements_comments_and_functions_of_a_file_are_counted() -> None:
    found = measure(SOURCE)
    assert (found.lines, found.statements, found.comments) == (20, 9, 2)
    assert found.functions == [Size(3, 2, "short"), Size(5, 4, "long")]


def test_a_readmes_longest_paragraph_is_prose() -> None:
    assert prose(README) == (42, 5)


def test_a_tree_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text(README)
    package = tmp_path / "package"
    (package / "room").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "module.py").write_text(SOURCE)
    (package / "room/other.py").write_text("def f() -> None:\n    pass\n" * 2)
    main([str(package)])
    row = capsys.readouterr().out.splitlines()[-1]
    # 13 statements in 24 lines; functions of 2, 2, 3 and 5 lines, and of 2, 2, 2 and 4 statements
    assert row == "| package | 3 | 24 | 2.5 / 2 | 5 / 4 (`long`) | 542 | 8.3% | 42 / 5 |"


def test_a_tree_without_python_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert f"{tmp_path}: there is no Python file in it" in capsys.readouterr().err
