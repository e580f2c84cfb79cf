#!/usr/bin/env bash
# Megatron's recomputation cuts the gradient of a layer's weights if the layer's input has none, and says nothing.
#
# megatron-core 0.16.1 (Python 3.11) and 0.19.2 (3.12), torch 2.13.0, CPU, one process. Without a GPU the state of its
# generator is replaced by the CPU's.
# One would think: a recomputed layer trains whenever its weights do, as it does without recomputation; or, as torch's
# own reentrant checkpoint does, it warns. Adapters beside a frozen embedding are such a case: the first layer's input
# has no gradient, so no layer has one.
# Found: the result does not require a gradient, and there is no warning:
#   torch, input with a gradient: result True, warnings 0
#   megatron, input with a gradient: result True, warnings 0
#   torch, input without one: result False, warnings 1
#   megatron, input without one: result False, warnings 0
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"$python" -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 numpy==2.4.6 psutil==7.2.2 \
    "megatron-core==0.16.1; python_version < '3.12'" "megatron-core==0.19.2; python_version >= '3.12'"
cat > recompute.py <<'PYTHON'
import warnings

import torch
import torch.utils.checkpoint
from megatron.core.tensor_parallel import random as megatron

megatron._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
megatron._set_cuda_rng_state = lambda *_, **__: None
megatron.initialize_rng_tracker()
layer = torch.nn.Linear(4, 4)
for words, needs in (("with a gradient", True), ("without one", False)):
    for name, recomputed in (
        ("torch", lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)),
        ("megatron", lambda x: megatron.checkpoint(layer, False, x)),
    ):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            result = recomputed(torch.ones(2, 4, requires_grad=needs))
        print(f"{name}, input {words}: result {result.requires_grad}, warnings {len(seen)}")
PYTHON
venv/bin/python recompute.py 2>/dev/null | tee seen
diff seen - <<'SEEN'
torch, input with a gradient: result True, warnings 0
megatron, input with a gradient: result True, warnings 0
torch, input without one: result False, warnings 1
megatron, input without one: result False, warnings 0
SEEN
