"""Measures Python source trees, a row of a Markdown table each: `measure_tree.py FOLDER ...`.

    python tools/measure_tree.py megatron_efr ../nanochat/nanochat

A statement is what Python's grammar calls one, `if` and `def` included, a docstring excluded. A
function's lines and statements are those from its `def` to its end, with the functions within it;
lines include blank ones and comments. README.md is that of the nearest folder above. Its tables,
code, lists and headings are no paragraphs.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import statistics
import tokenize
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

Function = ast.FunctionDef | ast.AsyncFunctionDef
HEADINGS = (
    "tree",
    "files",
    "lines",
    "function, median: lines / statements",
    "longest function: lines / statements",
    "statements per 1,000 lines",
    "lines with a comment",
    "README: words / longest paragraph",
)


class Size(NamedTuple):
    """Length of a function; the longer one is the greater one."""

    lines: int
    statements: int
    name: str


class Source(NamedTuple):
    """Totals of one file, or of all files of a tree."""

    lines: int
    statements: int
    comments: int
    functions: list[Size]


def measure(text: str) -> Source:
    """One file's figures."""
    tree = ast.parse(text)
    functions = [
        Size((node.end_lineno or node.lineno) - node.lineno + 1, _statements(node), node.name)
        for node in ast.walk(tree)
        if isinstance(node, Function)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    return Source(len(text.splitlines()), _statements(tree), len(comments), functions)


def _statements(tree: ast.AST) -> int:
    """The statements in a tree, itself included if it is one; docstrings are none."""
    return sum(isinstance(node, ast.stmt) and not _is_text(node) for node in ast.walk(tree))


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def readme_of(folder: Path) -> Path | None:
    """The README.md of the nearest folder that has one, from this one upwards."""
    candidates = (each / "README.md" for each in (folder, *folder.parents))
    return next((path for path in candidates if path.is_file()), None)


def prose(markdown: str) -> tuple[int, int]:
    """The words of a README, and those of its longest paragraph."""
    text = re.sub(r"^```.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE)
    blocks = [block for block in re.split(r"\n\s*\n", text) if block.strip()]
    paragraphs = [
        block for block in blocks if not re.match(r"\s*(\||#|[-*+] |\d+\. |<)|    ", block)
    ]
    return len(markdown.split()), max((len(block.split()) for block in paragraphs), default=0)


def row(folder: Path) -> list[str]:
    """The cells of a tree that has Python files."""
    sources = [measure(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.py"))]
    lines = sum(source.lines for source in sources)
    statements = sum(source.statements for source in sources)
    comments = sum(source.comments for source in sources)
    functions = [function for source in sources for function in source.functions] or [
        Size(0, 0, "-")
    ]
    longest = max(functions)
    readme = readme_of(folder.resolve())
    words, paragraph = prose(readme.read_text(encoding="utf-8")) if readme else (0, 0)
    middle_lines = statistics.median(function.lines for function in functions)
    middle_statements = statistics.median(function.statements for function in functions)
    return [
        folder.resolve().name,
        f"{len(sources):,}",
        f"{lines:,}",
        f"{middle_lines:g} / {middle_statements:g}",
        f"{longest.lines:,} / {longest.statements:,} (`{longest.name}`)",
        f"{1000 * statements / lines:.0f}",
        f"{comments / lines:.1%}",
        f"{words:,} / {paragraph:,}",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    folders = parser.parse_args(argv).folders
    for folder in folders:
        if not any(folder.rglob("*.py")):
            parser.error(f"{folder}: there is no Python file in it")
    print(f"| {' | '.join(HEADINGS)} |")
    print("|---|" + "---:|" * (len(HEADINGS) - 1))
    for folder in folders:
        print(f"| {' | '.join(row(folder))} |")


if __name__ == "__main__":
    main()
