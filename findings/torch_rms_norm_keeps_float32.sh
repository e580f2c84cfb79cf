#!/usr/bin/env bash
# torch's rms_norm keeps four times its input for the backward pass in bfloat16 on a CPU, layer_norm once.
#
# torch 2.13.0, CPU.
# One would think: rms_norm, which autograd's profile calls _fused_rms_norm, keeps its input and a factor a row, as layer_norm does.
# Found, in multiples of the input's bytes (256 rows of 512): it keeps its input and its result before the weight, both in float32:
#   torch.float32: layer_norm keeps 1.01, rms_norm 2.01
#   torch.bfloat16: layer_norm keeps 1.01, rms_norm 4.01
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"$python" -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 numpy==2.4.6
cat > kept.py <<'PYTHON'
from collections.abc import Callable

import torch
from torch.nn.functional import layer_norm, rms_norm


def kept(norm: Callable[..., torch.Tensor], dtype: torch.dtype) -> float:
    """Bytes of what autograd keeps, over the input's."""
    x = torch.ones(256, 512, dtype=dtype, requires_grad=True)
    weight = torch.ones(512, dtype=dtype, requires_grad=True)
    saved: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        norm(x, (512,), weight)
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in saved}
    return sum(storages.values()) / x.nbytes


for dtype in (torch.float32, torch.bfloat16):
    print(f"{dtype}: layer_norm keeps {kept(layer_norm, dtype):.2f}, rms_norm {kept(rms_norm, dtype):.2f}")
PYTHON
venv/bin/python kept.py | tee seen
diff seen - <<'SEEN'
torch.float32: layer_norm keeps 1.01, rms_norm 2.01
torch.bfloat16: layer_norm keeps 1.01, rms_norm 4.01
SEEN
