"""Writes the pages of methods: `python -m megatron_efr.methods [FOLDER]`, docs/ by default."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_efr.methods.page import pages


def write(folder: Path) -> None:
    """Write every page into a folder, and take away the page of a kind that there is no more."""
    texts = {folder / path: text for path, text in pages().items()}
    (folder / "methods").mkdir(exist_ok=True)
    for path in set((folder / "methods").glob("*.md")) - set(texts):
        path.unlink()
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m megatron_efr.methods", description="Writes the pages of methods."
    )
    parser.add_argument("folder", nargs="?", default="docs", type=Path, help="docs/ by default")
    folder = parser.parse_args().folder
    if not folder.is_dir():
        parser.error(
            f"{folder}: there is no such folder; run it from the repository's root, or name one"
        )
    write(folder)
