"""`model.kernels`: what is chosen, what is said, and that the torch path leaves Triton alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_efr.config import ConfigError
from megatron_efr.kernels import choose_backend
from megatron_efr.policy import Ranks
from tests.policies import make_policy

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")


@without_cuda
def test_auto_without_cuda_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choose_backend("auto") == ("torch", "auto: there is no CUDA device")
    assert choose_backend("torch") == ("torch", "as configured")
    with pytest.raises(
        ConfigError, match=r"model\.kernels: triton is asked for, and there is no CUDA device"
    ):
        choose_backend("triton")


def test_auto_with_cuda_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_backend("auto") == ("triton", "auto: CUDA is present and triton imports")
    assert choose_backend("triton") == ("triton", "as configured")
    monkeypatch.setitem(sys.modules, "triton", None)  # import raises
    backend, reason = choose_backend("auto")
    assert backend == "torch"
    assert reason.startswith("auto: triton does not import")
    with pytest.raises(ConfigError, match="triton does not import"):
        choose_backend("triton")


@without_cuda
def test_a_policy_says_its_choice_once(
    tied_model: Path, ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    make_policy(tied_model, ranks)
    assert capsys.readouterr().err.count("kernels: torch (auto: there is no CUDA device)") == 1


@pytest.mark.parametrize("blocked", [False, True], ids=["triton at hand", "no triton"])
def test_torch_path_never_imports_triton(blocked: bool) -> None:
    code = f"""
import sys
if {blocked}:
    sys.modules["triton"] = None
import torch
from megatron_efr import kernels
x, w = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
kernels.linear_logprob(x, w, torch.arange(5), entropy=True)[0].sum().backward()
assert x.grad is not None
assert sys.modules.get("triton") is None, "triton was imported"
"""
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
