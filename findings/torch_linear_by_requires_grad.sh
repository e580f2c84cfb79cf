#!/usr/bin/env bash
# torch.nn.functional.linear gives other numbers if its weight wants a gradient.
#
# torch 2.13.0, Python 3.11, CPU, one thread.
# One would think: requires_grad decides what is recorded, never what is computed.
# Found: of an input of three dimensions with a stride as a transpose leaves it, [tokens, 1, width] made of [1, tokens,
# width] as Megatron's embedding makes it, the product is folded to two dimensions if a gradient is wanted, and is a
# batched one if none is. Without bias, 1,920 tokens, 64 to 16:
#   no gradient against gradient: differ in 83.2% of the numbers, by at most 1.0e-05; of two dimensions: in 0.0%
# A weight that is computed, as adapters joined by torch.cat are, wants none under no_grad: log-probs taken so are not
# those that a training step starts from, and a ratio of 1 is not exactly 1.
set -euo pipefail
python=${PYTHON:-python3.11}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"$python" -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 numpy==2.4.6
cat > linear.py <<'PYTHON'
import torch
from torch.nn.functional import linear

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
x = torch.randn(1, 1920, 64, generator=generator).transpose(0, 1)
weight = torch.randn(16, 64, generator=generator, requires_grad=True)


def apart(x):
    return (linear(x, weight).detach() - linear(x, weight.detach())).abs()


three, two = apart(x), apart(x.flatten(0, 1))
share, none = (float((found > 0).double().mean()) for found in (three, two))
print(f"no gradient against gradient: differ in {share:.1%} of the numbers, by at most {float(three.max()):.1e}; "
      f"of two dimensions: in {none:.1%}")
assert share > 0.05 and 0 < float(three.max()) < 1e-4 and none == 0
PYTHON
venv/bin/python linear.py 2>/dev/null
