"""The words of README, CONTRIBUTING and docs/ hold: links lead somewhere, and what is named
exists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from megatron_efr.cli import PROGRAMS
from megatron_efr.config import DpoConfig, EvaluateConfig, SftConfig, TrainConfig

pytestmark = pytest.mark.alike

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CONFIGS = (TrainConfig, SftConfig, DpoConfig, EvaluateConfig)

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(r"\b(?:tests|tools|launch|examples|docs|findings|megatron_efr)/[\w./-]*\w")
PROGRAM = re.compile(r"(?:^ {4}|`)(?:\.venv/bin/)?efr ([a-z]+)", re.MULTILINE)
COMMAND = re.compile(
    r"(?:^ {4}|`)(?:\.venv/bin/)?(?:efr|bash launch/[\w.]+|python tools/[\w./]+)( [^`\n#]*)",
    re.MULTILINE,
)
FLAG = re.compile(r"--[a-z][a-z-]*[a-z]")
SECTIONS = {name for config in CONFIGS for name in config.model_fields}
KEY = re.compile(rf"`((?:{'|'.join(sorted(SECTIONS))})(?:\.[a-z_]+)+)")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors(page: Path) -> set[str]:
    """Headings as links name them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def targets(page: Path) -> Iterator[tuple[Path, str]]:
    """The files that a page links to, and the heading in each."""
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if not link.startswith(("http://", "https://")):
            name, _, anchor = link.partition("#")
            yield (page.parent / name).resolve() if name else page, anchor


def has_key(model: type[BaseModel], names: list[str]) -> bool:
    """True if the key exists; fields that are passed on to other software end the search."""
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    if (field := fields.get(names[0])) is None:
        return False
    inner = field.annotation
    known = isinstance(inner, type) and issubclass(inner, BaseModel)
    return (
        len(names) == 1
        or not known
        or bool(inner.model_config.get("extra") == "allow")
        or has_key(inner, names[1:])
    )


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in targets(page):
        assert target.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {target.name}#{anchor}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set[Path](), [README]
    while waiting:
        page = waiting.pop()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            waiting += [target for target, _ in targets(page)]
    assert set(PAGES) <= reached


@each_page
def test_files_programs_and_keys_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [name for name in FILE.findall(text) if not (ROOT / name).exists()] == []
    assert [name for name in PROGRAM.findall(text) if name not in PROGRAMS] == []
    keys = {key for key in KEY.findall(text) if not key.endswith((".py", ".yaml", ".md"))}
    keys -= {
        key
        for key in keys
        if (ROOT / "megatron_efr" / key.replace(".", "/")).with_suffix(".py").exists()
    }
    unknown = [
        key for key in keys if not any(has_key(config, key.split(".")) for config in CONFIGS)
    ]
    assert unknown == []


def test_every_flag_of_a_command_exists() -> None:
    sources = [
        path for part in ("megatron_efr", "tools", "launch") for path in (ROOT / part).rglob("*.*")
    ]
    texts = [
        path.read_text(encoding="utf-8")
        for path in sources
        if path.suffix in (".py", ".sh", ".sbatch")
    ]
    known = {flag for text in texts for flag in FLAG.findall(text)}
    named = {
        flag
        for page in PAGES
        for words in COMMAND.findall(page.read_text(encoding="utf-8"))
        for flag in FLAG.findall(words)
    }
    assert len(named) > 20
    assert named - known == set()


def prose(text: str) -> list[str]:
    """The paragraphs of a page and the points of its lists."""
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*] |\d+\. ))", text)
    return [block for block in blocks if not block.startswith(("|", "    ", "#"))]


def test_the_readme_is_one_screen_of_short_paragraphs() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert [block for block in prose(text) if len(block.split()) > 60] == []


@each_page
def test_the_paragraphs_of_a_page_are_short(page: Path) -> None:
    assert [
        block for block in prose(page.read_text(encoding="utf-8")) if len(block.split()) > 90
    ] == []


@pytest.mark.parametrize("page", [README, ROOT / "docs/programs.md"], ids=lambda page: page.name)
def test_every_program_has_a_row(page: Path) -> None:
    rows = re.findall(r"^\| `efr ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(rows) == set(PROGRAMS)


def test_every_room_is_in_the_table_of_rooms() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in (ROOT / "megatron_efr").glob("*/__init__.py")}
    assert {room for room in rooms if f"`{room}/`" not in text} == set()


def test_the_readme_counts_the_methods() -> None:
    """Those that are not experimental: the page has a row for each."""
    names = re.findall(
        r"^\| \[`([\w.]+)`\]", (ROOT / "docs/methods.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    count = sum(not name.startswith("experimental.") for name in names)
    text = README.read_text(encoding="utf-8")
    assert f"[{count - 1} others](docs/methods.md)" in text
    assert f"| {count} methods by name |" in text
