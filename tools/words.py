"""Reports docstrings that begin with a question word, and files that say "where" too often.

    python tools/words.py FOLDER ...

A condition is an `if`; a docstring names the thing or the act first. The tests refuse such openings
in the package and in tools (tests/unit/tools/test_words.py); the share of "where" is reported
alone.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

FIRST_WORDS = ("What", "Where", "Whether", "How", "When", "Which", "Who", "Why")
WHERE_PER_1000 = 2.0
FEWEST_WORDS = 200  # of a file whose share of a word means something


class Prose(NamedTuple):
    """A file's docstrings, each with its line, and all its words: docstrings and comments."""

    docstrings: list[tuple[int, str]]
    words: list[str]


def prose(source: str) -> Prose:
    """The docstrings and words of a module's source. A text that follows an assignment at once
    documents it.
    """
    docstrings: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for i, each in enumerate(body):
            if (
                isinstance(each, ast.Expr)
                and isinstance(each.value, ast.Constant)
                and isinstance(each.value.value, str)
            ):
                documents = i == 0 or isinstance(body[i - 1], ast.Assign | ast.AnnAssign)
                docstrings += [(each.lineno, each.value.value)] if documents else []
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    words = re.findall(r"[A-Za-z']+", " ".join([*(text for _, text in docstrings), *comments]))
    return Prose(sorted(docstrings), words)


def questions(found: Prose) -> Iterator[tuple[int, str]]:
    """(line, first line) of each docstring that begins with one of FIRST_WORDS."""
    for line, text in found.docstrings:
        first = text.strip().splitlines()[0]
        if re.split(r"\W", first, maxsplit=1)[0] in FIRST_WORDS:
            yield line, first


def report(path: Path) -> Iterator[str]:
    """A file's faults of both kinds, a line each."""
    found = prose(path.read_text(encoding="utf-8"))
    for line, first in questions(found):
        yield f"{path}:{line}: {first}"
    share = 1000 * sum(word.lower() == "where" for word in found.words) / max(len(found.words), 1)
    if share > WHERE_PER_1000 and len(found.words) >= FEWEST_WORDS:
        yield f"{path}: {share:.1f} where in 1,000 words"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folders", nargs="*", type=Path, default=[Path("megatron_efr"), Path("tools")]
    )
    parser.add_argument("--total", action="store_true", help="the counts alone")
    given = parser.parse_args(argv)
    files = sorted(
        path
        for folder in given.folders
        for path in ([folder] if folder.is_file() else folder.rglob("*.py"))
    )
    lines = [line for path in files for line in report(path)]
    openings = sum(" where in 1,000 words" not in line for line in lines)
    print(
        "\n".join(
            [
                *([] if given.total else lines),
                f"words: {openings} docstrings begin with {', '.join(FIRST_WORDS)}; "
                f"{len(lines) - openings} files say where more than {WHERE_PER_1000:g} times in "
                "1,000 words",
            ]
        )
    )


if __name__ == "__main__":
    main()
