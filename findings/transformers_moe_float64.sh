#!/usr/bin/env bash
# A mixture of experts does not run in float64 as transformers loads it.
#
# transformers 5.23.0, torch 2.13.0, Python 3.11, CPU.
# One would think: `.double()` makes a reference of any model, as it does of a dense one.
# Found: the experts' default implementation is torch's grouped product, which takes float32 and 16-bit types alone:
#   qwen3, float64: float64 logits
#   qwen3_moe, grouped_mm, float64: RuntimeError
#   qwen3_moe, eager, float64: float64 logits
# So whoever compares with an exact reference sets experts_implementation="eager" first.
set -euo pipefail
python=${PYTHON:-python3.11}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"$python" -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cat > moe.py <<'PYTHON'
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZE = dict(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


def outcome(family, implementation, **more):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZE, **more)).double()
    if implementation:
        model.set_experts_implementation(implementation)
    try:
        with torch.no_grad():
            found = str(model(torch.tensor([[1, 2, 3]])).logits.dtype).removeprefix("torch.") + " logits"
    except RuntimeError as error:
        found = type(error).__name__
    used = getattr(model.config, "_experts_implementation", None)
    print(", ".join(filter(None, [family, used if more else None, f"float64: {found}"])))
    return found


assert outcome("qwen3", None) == "float64 logits"
assert outcome("qwen3_moe", None, **EXPERTS) == "RuntimeError"
assert outcome("qwen3_moe", "eager", **EXPERTS) == "float64 logits"
PYTHON
venv/bin/python moe.py 2>/dev/null
