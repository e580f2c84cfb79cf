"""`rollout.server` is held to the sources of the SGLang that will read it, which is not imported
for that.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_efr.config import ConfigError, EnginesConfig
from megatron_efr.rollout.servers.arguments import check_against, check_server_arguments

FIELDS = """
class Memory:
    mem_fraction_static: A[Optional[float], "share of the memory"] = None
    max_total_tokens: A[Optional[int], Arg(help="tokens", choices=[1])] = None
    schedule_policy: A[Literal["lpm", "fcfs"], "order"] = "fcfs"
    cuda_graph_bs: A[Optional[List[int]], "sizes"] = None
    disable_radix_cache: A[bool, "no cache"] = False
    cuda_graph_config: A[Optional[CudaGraphConfig], "a class of its own"] = None
"""
OLD = 'parser.add_argument("--old-name", action=DeprecatedAction)'


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "sglang"
    (folder / "srt/arg_groups/fields").mkdir(parents=True)
    (folder / "srt/arg_groups/fields/memory.py").write_text(FIELDS)
    (folder / "srt/server_args.py").write_text(OLD)
    (folder / "__init__.py").write_text("raise ImportError('imported')")
    return folder


@pytest.mark.parametrize(
    "given",
    [
        {"mem_fraction_static": 0.6, "max_total_tokens": 4096, "schedule_policy": "lpm"},
        {"mem_fraction_static": 1, "cuda_graph_bs": [1, 2], "disable_radix_cache": True},
        {"mem_fraction_static": None, "cuda_graph_config": {"a": 1}, "old_name": "x"},
    ],
)
def test_what_sglang_takes_passes(package: Path, given: dict[str, Any]) -> None:
    check_against(package, given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"mem_fraction_static": "0.6"},
            r"rollout\.server\.mem_fraction_static: SGLang's server takes .*float.* '0\.6'",
        ),
        (
            {"mem_fraction_statc": 0.6},
            r"rollout\.server\.mem_fraction_statc: .* no such field; did you mean mem_fraction",
        ),
        ({"max_total_tokens": 1.5}, r"rollout\.server\.max_total_tokens: .*int.*, not 1\.5"),
        (
            {"schedule_policy": "lru"},
            r"rollout\.server\.schedule_policy: .*'lpm', 'fcfs'.*, not 'lru'",
        ),
        ({"cuda_graph_bs": 4}, r"rollout\.server\.cuda_graph_bs: .*not 4"),
        (
            {"disable_radix_cache": "yes"},
            r"rollout\.server\.disable_radix_cache: .*bool, not 'yes'",
        ),
        ({"mem_fraction_static": float("nan")}, r"rollout\.server\.mem_fraction_static: .*not nan"),
    ],
)
def test_what_it_does_not_take_is_named(package: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_against(package, given)


def test_the_interpreters_own_package_is_asked(package: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    engines = EnginesConfig(engine="sglang", python=str(python), server={"schedule_policy": 3})
    with pytest.raises(ConfigError, match=r"rollout\.server\.schedule_policy"):
        check_server_arguments(engines)
    check_server_arguments(engines.model_copy(update={"server": {"schedule_policy": "lpm"}}))
    check_server_arguments(engines.model_copy(update={"python": str(tmp_path / "absent")}))


def test_sources_of_another_layout_are_left_to_sglang(tmp_path: Path) -> None:
    check_against(tmp_path, {"anything": 1})
