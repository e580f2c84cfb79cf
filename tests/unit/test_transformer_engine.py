"""A Transformer Engine that is installed by half: the doctor names it, and a run goes on without
it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_efr.doctor.packages import check_transformer_engine
from tests.unit.doctor.test_doctor import distribution

ERROR = "Could not find shared object file for Transformer Engine torch lib"


@pytest.fixture(params=["core", "whole"])
def half(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A path with the package as its core wheel alone leaves it; `whole`: which fails at its very
    first line.
    """
    raised = f"raise FileNotFoundError({ERROR!r})\n"
    package = tmp_path / "path/transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").write_text(
        raised if request.param == "whole" else "import transformer_engine.common\n"
    )
    (package / "common.py").write_text("")
    (package / "pytorch/__init__.py").write_text(raised)
    return tmp_path / "path"


_ASKED = """
import sys
from megatron_efr import {room}
import megatron.core.transformer
from megatron.core.extensions import transformer_engine
from megatron_efr.config import ConfigError, ModelConfig
from megatron_efr.policy.divisibility import te_layers
assert not te_layers(ModelConfig(path="m", dtype="bfloat16"))
try:
    te_layers(ModelConfig(path="m", dtype="bfloat16", layers="transformer_engine"))
except ConfigError as error:
    print(error)
"""


@pytest.mark.heavy
@pytest.mark.parametrize(
    "room", ["policy", "checkpoint.checkpoints as c", "checkpoint.shards as s"]
)
def test_a_run_goes_on_without_it_and_says_so_once(room: str, half: Path) -> None:
    room = room.replace(" as", " as")
    lines = _ASKED.replace("from megatron_efr import {room}", f"import megatron_efr.{room}")
    done = subprocess.run(
        [sys.executable, "-c", lines], capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHONPATH": f"{half}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.count(
            f"does not import (FileNotFoundError: {ERROR}); this process goes on without it"
        )
        == 1
    )
    assert "pip uninstall transformer-engine" in done.stderr
    assert (
        "model.layers: transformer_engine is set, and Transformer Engine or CUDA is missing"
    ) in done.stdout


@pytest.mark.heavy
@pytest.mark.parametrize("needed", [True, False])
def test_the_doctor_names_it_with_the_cure(
    needed: bool, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{half}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(half)
    [found] = check_transformer_engine(needed)
    assert (found.subject, found.verdict) == ("Transformer Engine", "problem" if needed else "note")
    assert found.found == f"of no distribution, does not import: FileNotFoundError: {ERROR}"
    assert "bash launch/install_h100.sh builds its part for torch; or pip uninstall" in found.advice
    distribution(half, "transformer-engine", "2.10.0")
    [found] = check_transformer_engine(needed)
    assert found.found == f"2.10.0, does not import: FileNotFoundError: {ERROR}"
