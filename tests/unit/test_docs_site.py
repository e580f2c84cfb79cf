"""The documentation's site: built by its script, every page is in the menu, and what leads nowhere
fails it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.alike, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
ENTRY = re.compile(r'<li class="toctree-l[12][^"]*"><a class="reference internal" href="([^"]+)"')
PARTS = ("docs", "examples", "launch", "megatron_efr")


def build(copy: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "launch/docs.sh"], cwd=copy, capture_output=True, text=True, check=False
    )


def test_the_site_has_every_page_and_refuses_what_leads_nowhere(tmp_path: Path) -> None:
    for part in PARTS:
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.md"), ROOT / "LICENSE"]:
        shutil.copy(path, tmp_path)
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    pages = {
        str(path.relative_to(tmp_path).with_suffix(".html"))
        for path in (tmp_path / "docs").rglob("*.md")
    }
    front = (site / "index.html").read_text(encoding="utf-8")
    assert pages <= set(
        re.findall(
            r'<li class="toctree-l[12][^"]*"><a class="reference internal" href="([^"]+)"', front
        )
    )
    assert all((site / page).is_file() for page in pages)

    (tmp_path / "docs/orphan.md").write_text("# Nobody leads here\n\n[nor](from.md) here\n")
    refused = build(tmp_path)
    assert refused.returncode != 0
    assert "docs/orphan.md" in refused.stderr
    assert "from.md" in refused.stderr
