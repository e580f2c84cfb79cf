"""A converted checkpoint loads under any layout, and what any layout saves converts back to the
same bytes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_efr import convert
from tests.families import make_family_folder
from tests.parallel.launch import run_ranks

pytestmark = pytest.mark.parallel


@pytest.mark.parametrize(
    ("family", "layout", "processes"),
    [
        ("qwen3-tied", "tensor=2", 2),  # one KV group on two ranks
        ("llama", "pipeline=2", 2),
        ("qwen2", "tensor=2,pipeline=2", 4),
        ("qwen3-moe", "expert=2", 2),  # with data parallelism
        ("llama3", "tensor=4", 4),  # two KV groups on four ranks
    ],
)
def test_loads_and_comes_back(family: str, layout: str, processes: int, tmp_path: Path) -> None:
    path = make_family_folder(tmp_path / "model", family)
    convert.hf_to_megatron(path, tmp_path / "megatron")
    run_ranks(
        processes, "tests.parallel.converted", path, tmp_path / "megatron", tmp_path / "run", layout
    )
    saved = tmp_path / "run" / "step_000001"
    wanted = convert.compare_bytes(path, tmp_path / "megatron")
    assert convert.compare_bytes(path, saved) == wanted
    convert.megatron_to_hf(saved, tmp_path / "back")
    assert convert.compare_bytes(tmp_path / "back", tmp_path / "megatron") == wanted
