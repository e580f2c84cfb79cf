"""How Sphinx makes the site of these pages (launch/docs.sh): README is its front page, and its
index the menu.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

project = "megatron_efr"
release = re.findall(
    '__version__ = "(.+)"', (Path(__file__).parents[1] / "megatron_efr/__init__.py").read_text()
)[0]
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "docs/methods/*.md"]
html_theme = "furo"
html_title = f"megatron_efr {release}"
html_show_copyright = html_show_sphinx = html_copy_source = False
highlight_language = "none"
myst_heading_anchors = 4

_LINK = re.compile(r"\]\(((?:docs/)?[\w-]+)\.md\)")
_KIND = re.compile(r"\]\((methods/[\w-]+)\.md\)")


def menu(readme: str) -> str:
    """The README's index of documentation, line by line, as Sphinx's menu; what else it links to,
    as the last part.
    """
    index = readme.partition("\n## Documentation\n")[2].partition("\n## ")[0]
    parts = [(part.partition(":")[0], _LINK.findall(part)) for part in index.strip().split("\n- ")]
    listed = {page for _, pages in parts for page in pages}
    parts.append(
        ("Project", [page for page in dict.fromkeys(_LINK.findall(readme)) if page not in listed])
    )
    return "\n\n".join(_toctree(pages, f":caption: {name.strip('- ')}") for name, pages in parts)


def _toctree(pages: list[str], *options: str) -> str:
    """A part of Sphinx's menu, not shown on the page that it stands on."""
    return "\n".join(["```{toctree}", ":hidden:", *options, "", *pages, "```"])


def add_menu(app: Sphinx, page: str, source: list[str]) -> None:
    """Append the menu to the front page as it is read, and the pages of kinds to that of
    methods.
    """
    if page == root_doc:
        source[0] += f"\n\n{menu(source[0])}\n"
    if page == "docs/methods":
        source[0] += f"\n\n{_toctree(_KIND.findall(source[0]))}\n"


def setup(app: Sphinx) -> None:
    """Connect the menu."""
    app.connect("source-read", add_menu)
