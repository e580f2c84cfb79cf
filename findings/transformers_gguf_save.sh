#!/usr/bin/env bash
# transformers 5.23.0, gguf 0.19.0, accelerate 1.15.0: a model loaded from a GGUF file cannot be saved.
#
# Its weights are dequantised as they are loaded, and are ordinary float32 parameters; the file below is not even
# quantised. save_pretrained refuses it all the same. A model of the same class, given the state dict, saves.
#
# Output seen:
#     parameters: torch.float32
#     save_pretrained: The model is quantized with gguf and is not serializable
#     another of its class: saved
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 gguf==0.19.0 numpy==2.4.6 accelerate==1.15.0
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON' 2> errors > out || { cat errors; exit 1; }
import gguf
import numpy as np
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|end_of_text|>"]
writer = gguf.GGUFWriter("model.gguf", "llama")
writer.add_block_count(1)
writer.add_context_length(131072)
writer.add_embedding_length(64)
writer.add_feed_forward_length(64)
writer.add_head_count(1)
writer.add_head_count_kv(1)
writer.add_rope_freq_base(500000.0)
writer.add_rope_dimension_count(64)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_vocab_size(len(tokens))
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("llama-bpe")
writer.add_token_list(tokens)
writer.add_token_types([1] * len(tokens))
square = np.eye(64, dtype=np.float32)
for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
    writer.add_tensor(f"blk.0.{name}.weight", square)
for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
    writer.add_tensor(f"{name}.weight", np.ones(64, np.float32))
writer.add_tensor("token_embd.weight", np.ones((len(tokens), 64), np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
model = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf")
print("parameters:", *{str(parameter.dtype) for parameter in model.parameters()})
try:
    model.save_pretrained("saved")
except ValueError as error:
    print("save_pretrained:", str(error).split(" - ")[0])
config = AutoConfig.from_pretrained(".", gguf_file="model.gguf")
other = LlamaForCausalLM(config)
other.load_state_dict(model.state_dict())
other.save_pretrained("saved")
print("another of its class: saved")
PYTHON
cat out
diff out - <<'EXPECTED'
parameters: torch.float32
save_pretrained: The model is quantized with gguf and is not serializable
another of its class: saved
EXPECTED
