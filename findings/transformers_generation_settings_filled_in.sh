#!/usr/bin/env bash
# A GenerationConfig that is handed to generate() cannot say that nothing ends a response.
#
# transformers 5.23.0, torch 2.13.0, Python 3.11, CPU.
# One would think: generate(generation_config=C) goes by C alone, and eos_token_id=None in it means no end.
# Found: what is None in C is filled in from the model's own generation_config, an end as well as a repetition penalty:
#   the model has no end, C none: 12 tokens
#   the model ends at a token, C says None: 1 token
#   the model has a repetition penalty, C none: other tokens
#   the model has a repetition penalty, C says 1.0: the same tokens
# So whoever wants responses of one length, or another program's sampling, sets model.generation_config first.
set -euo pipefail
python=${PYTHON:-python3.11}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"$python" -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cat > settings.py <<'PYTHON'
import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

torch.manual_seed(0)
model = Qwen2ForCausalLM(Qwen2Config(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=2)).eval()
prompt = torch.tensor([[3, 4, 5]])


def drawn(own, **given):
    model.generation_config = GenerationConfig(**own)
    config = GenerationConfig(do_sample=False, max_new_tokens=12, pad_token_id=0, **given)
    return model.generate(prompt, generation_config=config)[0, 3:].tolist()


def count(tokens):
    return f"{len(tokens)} token" + ("s" if len(tokens) > 1 else "")


free = drawn({})
ended = drawn({"eos_token_id": free[0]}, eos_token_id=None)
filled = drawn({"repetition_penalty": 50.0})
told = drawn({"repetition_penalty": 50.0}, repetition_penalty=1.0)
print("the model has no end, C none:", count(free))
print("the model ends at a token, C says None:", count(ended))
print("the model has a repetition penalty, C none:", "the same tokens" if filled == free else "other tokens")
print("the model has a repetition penalty, C says 1.0:", "the same tokens" if told == free else "other tokens")
assert len(free) == 12 and len(ended) == 1 and filled != free and told == free
PYTHON
venv/bin/python settings.py 2>/dev/null
