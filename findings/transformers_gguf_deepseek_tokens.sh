#!/usr/bin/env bash
# transformers 5.23.0, gguf 0.19.0: the tokenizer of a DeepSeek-R1-Distill GGUF file has no <｜User｜>, and its end token is
# not the model's.
#
# Control tokens of that family are written with characters outside the byte alphabet ("｜", "▁"). The loader takes such
# a token in a byte-level vocabulary for a mistake of llama.cpp's: it respells the token by its bytes and does not add it.
# So the chat template's tags are cut into pieces, and the end token, which is added again by its own text, gets an id
# beyond the vocabulary: the model's embedding of 260 rows has none for it, and generation does not know the token at
# which the model ends. Nothing is said.
#
# Output seen:
#     260 tokens, ids 0 to 259
#     <｜User｜>a: < ï ½ ľ U s e r ï ½ ľ > a
#     end token: <｜end▁of▁sentence｜> in the file 259 loaded 261
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 gguf==0.19.0 numpy==2.4.6
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON' 2> errors > out || { cat errors; exit 1; }
import gguf
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

CONTROL = ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜end▁of▁sentence｜>"]
tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", *CONTROL]
writer = gguf.GGUFWriter("model.gguf", "qwen2")
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("deepseek-r1-qwen")
writer.add_token_list(tokens)
writer.add_token_types([1] * (len(tokens) - len(CONTROL)) + [3] * len(CONTROL))
writer.add_token_merges(["a b"])
writer.add_eos_token_id(len(tokens) - 1)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
tokenizer = AutoTokenizer.from_pretrained(".", gguf_file="model.gguf")
print(len(tokens), "tokens, ids 0 to", len(tokens) - 1)
print("<｜User｜>a:", " ".join(tokenizer.tokenize("<｜User｜>a")))
print("end token:", tokenizer.eos_token, "in the file", tokens.index("<｜end▁of▁sentence｜>"), "loaded", tokenizer.eos_token_id)
PYTHON
cat out
diff out - <<'EXPECTED'
260 tokens, ids 0 to 259
<｜User｜>a: < ï ½ ľ U s e r ï ½ ľ > a
end token: <｜end▁of▁sentence｜> in the file 259 loaded 261
EXPECTED
