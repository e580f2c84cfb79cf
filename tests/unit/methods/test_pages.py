"""Methods' pages and descriptions: what is written of them is what the classes say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_efr.methods import METHODS
from megatron_efr.methods.__main__ import write
from megatron_efr.methods.page import pages

pytestmark = pytest.mark.alike


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_says_what_it_is(name: str) -> None:
    kind = METHODS[name]
    assert kind.source
    assert (kind.standing == "experimental") == name.startswith("experimental.")
    text = " ".join((kind.__doc__ or "").split())
    assert text
    assert "wrong" in text.lower()
    assert "truncated" in text.lower()
    assert "remembered" in text
    assert " = " in text
    for key, field in kind.model_fields.items():
        assert field.description, f"{name}.{key}"
        assert field.annotation is not Any
    if kind.standing == "experimental":
        assert "Open:" in text
        assert "Chosen:" in text


def sections() -> dict[str, str]:
    """Sections on each method in the pages of kinds, by its name."""
    kinds = [text for path, text in pages().items() if path.startswith("methods/")]
    parts = [part.partition("\n") for text in kinds for part in text.split("\n## ")[1:]]
    return {name: text for name, _, text in parts}


def test_the_pages_of_methods_are_what_the_classes_say() -> None:
    """If not: `python -m megatron_efr.methods`."""
    docs = Path(__file__).parents[3] / "docs"
    stored = [docs / "methods.md", *(docs / "methods").iterdir()]
    assert {
        str(path.relative_to(docs)): path.read_text(encoding="utf-8") for path in stored
    } == pages()
    assert set(sections()) == set(METHODS)
    rows = re.findall(r"^\| \[`([\w.]+)`\]", pages()["methods.md"], re.MULTILINE)
    assert sorted(rows) == sorted(METHODS)


def test_a_folder_of_pages_is_written_whole_and_has_no_page_of_a_kind_that_went(
    tmp_path: Path,
) -> None:
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods/gone.md").write_text("# Gone\n")
    write(tmp_path)
    found = {
        str(path.relative_to(tmp_path)): path.read_text(encoding="utf-8")
        for path in tmp_path.rglob("*.md")
    }
    assert found == pages()


def test_the_pages_name_every_option_with_a_default_that_reads_back() -> None:
    texts = sections()
    for name, kind in METHODS.items():
        rows = [line for line in texts[name].splitlines() if line.startswith("| `")]
        cells = [[cell.strip() for cell in row.split("|")] for row in rows]
        assert [row[1] for row in cells] == [f"`{key}`" for key in kind.model_fields]
        for row, field in zip(cells, kind.model_fields.values(), strict=True):
            assert len(row) == 6
            if row[3] == "required":
                assert field.is_required(), (name, row)
            else:
                assert ("null" if row[3] == "left out" else row[3].strip("`")) == json.dumps(
                    field.default
                ), (name, row)


def test_the_tables_have_whole_sentences() -> None:
    kinds, methods = [], []
    for path, text in pages().items():
        index = path == "methods.md"
        for line in text.splitlines():
            cells = line.split(" | ")
            if index and re.match(r"\| \[[^`]*\]\(methods/\w+\.md\) ", line):
                kinds.append(cells[1])
            if not index and re.match(r"\| \[`[\w.]+`\]\(#", line):
                methods.append(cells[1].removesuffix(" |"))
    assert len(kinds) > 10
    assert len(methods) == len(METHODS)
    assert [text for text in [*kinds, *methods] if not text.endswith(".")] == []
