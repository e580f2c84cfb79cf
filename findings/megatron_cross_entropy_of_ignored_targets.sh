#!/usr/bin/env bash
# Megatron's cross entropy takes a target of -100 for a token like any other.
#
# megatron-core 0.16.1 (Python 3.11) and 0.19.2 (3.12), torch 2.13.0, CPU, one process.
# One would think: like torch's, vocab_parallel_cross_entropy leaves targets of -100 out, or raises an error.
# Found: it gives them a finite loss and a gradient:
#   megatron: [2.621, 2.44, 2.374, 1.587, 1.273, 1.385]
#   torch:    [2.621, 2.44, 2.374, 0.0, 1.273, 0.0]
#   the gradient at the first -100 has norm 0.059
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"$python" -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 numpy==2.4.6 psutil==7.2.2 \
    "megatron-core==0.16.1; python_version < '3.12'" "megatron-core==0.19.2; python_version >= '3.12'"
cat > losses.py <<'PYTHON'
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
logits = torch.randn(6, 1, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
targets = torch.tensor([3, 1, 4, -100, 5, -100])[:, None]
losses = vocab_parallel_cross_entropy(logits.clone(), targets)
print("megatron:", [round(float(x), 3) for x in losses[:, 0]])
print("torch:   ", [round(float(x), 3) for x in F.cross_entropy(logits[:, 0], targets[:, 0], reduction="none")])
losses.mean().backward()
print("the gradient at the first -100 has norm", round(float(logits.grad[3].norm()), 3))
PYTHON
venv/bin/python losses.py 2>/dev/null | tee seen
diff seen - <<'SEEN'
megatron: [2.621, 2.44, 2.374, 1.587, 1.273, 1.385]
torch:    [2.621, 2.44, 2.374, 0.0, 1.273, 0.0]
the gradient at the first -100 has norm 0.059
SEEN
