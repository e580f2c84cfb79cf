#!/usr/bin/env bash
# transformers 5.23.0, gguf 0.19.0: a Llama 3.1 or 3.2 loaded from a GGUF file has lost its rope scaling.
#
# llama.cpp's converter writes no key for it: the divisor of each rotary frequency stands in a tensor, rope_freqs.weight.
# The loader drops that tensor and makes a configuration without scaling, so every position beyond the first is turned by
# other angles than in the published model (rope_type llama3, factor 32 for Llama 3.2). Nothing is said.
#
# Output seen:
#     divisors in the file: 1.0 to 32.0
#     loaded: {'rope_theta': 500000.0, 'rope_type': 'default'}
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 gguf==0.19.0 numpy==2.4.6
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON' 2> errors > out || { cat errors; exit 1; }
import gguf
import numpy as np
from tokenizers import pre_tokenizers
from transformers import AutoConfig

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
wavelengths = 2 * np.pi * 500000.0 ** (np.arange(0, 64, 2) / 64)
smooth = np.clip((8192 / wavelengths - 1) / (4 - 1), 0, 1)  # Llama 3.2: low 1, high 4, 8,192 positions, factor 32
writer.add_tensor("rope_freqs.weight", (1 / ((1 - smooth) / 32 + smooth)).astype(np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
stored = {tensor.name: tensor for tensor in gguf.GGUFReader("model.gguf").tensors}["rope_freqs.weight"].data
print("divisors in the file:", stored.min(), "to", stored.max())
print("loaded:", dict(sorted(AutoConfig.from_pretrained(".", gguf_file="model.gguf").rope_parameters.items())))
PYTHON
cat out
diff out - <<'EXPECTED'
divisors in the file: 1.0 to 32.0
loaded: {'rope_theta': 500000.0, 'rope_type': 'default'}
EXPECTED
