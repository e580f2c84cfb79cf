"""The checksums that servers on a GPU report, computed from what they were sent, beside SGLang's
own kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_efr.publication import checksums
from megatron_efr.publication.checksums import fmix32
from tests.engine import hashed
from tests.engine.conftest import PYTHON

KERNELS = "lib/python3*/site-packages/sglang/kernels/ops/memory/gpu_tensor_hash.py"


def test_they_are_those_of_sglangs_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = PYTHON.parents[1]
    if not (found := list(place.glob(KERNELS))):
        pytest.skip(f"{place} is not there: bash tools/setup_sglang_cpu.sh makes it")
    torch.manual_seed(0)
    sizes = (0, 1, 2, 3, 5, 255, 8192 * 2 - 1, 8192 * 2, 8192 * 2 + 1, 8192 * 2 * 5 + 77)
    tensors = [torch.randn(size).bfloat16() for size in sizes]
    tensors += [
        torch.randn(130, 257),
        torch.randn(257, 130).T,
        torch.zeros(9000),
        -torch.ones(9000),
    ]
    torch.save(tensors, tmp_path / "tensors.pt")
    done = subprocess.run(
        [sys.executable, "-O", hashed.__file__, str(found[0]), str(tmp_path / "tensors.pt")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    assert [fmix32(tensor) for tensor in tensors] == theirs
    monkeypatch.setattr(checksums, "_TILES", 2)  # taken in several parts
    assert [fmix32(tensor) for tensor in tensors] == theirs
    changed = tensors[-2].clone()
    changed[8999] = 2**-140  # one bit in the last word
    assert fmix32(changed) != theirs[-2]
