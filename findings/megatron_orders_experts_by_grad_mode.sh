#!/usr/bin/env bash
# A mixture of experts in Megatron-Core gives other numbers under torch.no_grad() than with gradients.
#
# megatron-core 0.19.2, torch 2.13.0, Python 3.12, CPU (0.16.1: no; 0.18.0 on: yes).
# One would think: grad mode decides what is recorded, never what is computed.
# Found: the router calls torch.topk(..., sorted=torch.is_grad_enabled()). The same experts come in another order without
# gradients, and their softmax is summed in that order. Top 8 of 16, 4,096 tokens:
#   the same experts: True, in the same order: False, weights that differ in a bit: 22.7%, by at most 1.2e-07
# So log-probs taken without gradients are not those that a training step starts from: a ratio of 1 is not exactly 1.
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"$python" -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 megatron-core==0.19.2 numpy==2.4.6
cat > routed.py <<'PYTHON'
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

torch.set_num_threads(1)
logits = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
weights, chosen = topk_routing_with_score_function(logits, 8, dense_output=True)
with torch.no_grad():
    weights_, chosen_ = topk_routing_with_score_function(logits, 8, dense_output=True)
same = torch.equal(chosen.sort(1).values, chosen_.sort(1).values)
one, other = (torch.zeros(4096, 16).scatter(1, c, w) for c, w in ((chosen, weights), (chosen_, weights_)))
apart = (one - other).abs()
share = float((apart[one > 0] > 0).double().mean())
print(f"the same experts: {same}, in the same order: {torch.equal(chosen, chosen_)}, weights that differ in a bit: "
      f"{share:.1%}, by at most {float(apart.max()):.1e}")
assert same and not torch.equal(chosen, chosen_) and share > 0.05 and 0 < float(apart.max()) < 1e-6
PYTHON
venv/bin/python routed.py 2>/dev/null
