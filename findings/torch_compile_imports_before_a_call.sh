#!/usr/bin/env bash
# torch.compile(f) imports the whole compiler where it decorates, not where f is first called, and also if compiling is disabled.
#
# torch 2.13.0, x86-64, CPU.
# One would think: the decorator is lazy, since nothing is compiled before a call, and TORCH_COMPILE_DISABLE=1 spares what it turns off.
# Found: a library whose modules decorate functions (Megatron-Core's fused activations do) has every program import Dynamo and Inductor,
# over 1,000 modules, whether one of the functions is ever called or not:
#   import torch: inductor imported: False
#   decorated, not called: inductor imported: True, over 1,000 modules more: True
#   the same with TORCH_COMPILE_DISABLE=1: inductor imported: True, over 1,000 modules more: True
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"$python" -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 numpy==2.4.6
cat > decorate.py <<'PYTHON'
import os
import sys

import torch

before = len(sys.modules)
imported = "torch._inductor.compile_fx" in sys.modules
disabled = os.environ.get("TORCH_COMPILE_DISABLE") == "1"
if not disabled:
    print(f"import torch: inductor imported: {imported}")


@torch.compile
def uncalled(x: torch.Tensor) -> torch.Tensor:
    """Never called."""
    return x + 1


name = "the same with TORCH_COMPILE_DISABLE=1" if disabled else "decorated, not called"
imported, more = "torch._inductor.compile_fx" in sys.modules, len(sys.modules) - before
print(f"{name}: inductor imported: {imported}, over 1,000 modules more: {more > 1000}")
PYTHON
{
    venv/bin/python decorate.py
    TORCH_COMPILE_DISABLE=1 venv/bin/python decorate.py
} 2>/dev/null | tee seen
diff seen - <<'SEEN'
import torch: inductor imported: False
decorated, not called: inductor imported: True, over 1,000 modules more: True
the same with TORCH_COMPILE_DISABLE=1: inductor imported: True, over 1,000 modules more: True
SEEN
