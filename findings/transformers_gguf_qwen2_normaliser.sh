#!/usr/bin/env bash
# transformers 5.23.0, gguf 0.19.0: a Qwen2 tokenizer loaded from a GGUF file does not normalise text.
#
# The published tokenizer.json has the normaliser NFC, and so has transformers' own class Qwen2Tokenizer. Loaded from a
# GGUF file the object is a Qwen2Tokenizer too, but its normaliser is none: an e followed by a combining accent gives
# other tokens than the letter é, and other ones than the model was trained with.
#
# Output seen:
#     from the GGUF file: Qwen2Tokenizer None ['e', 'Ì', 'ģ']
#     the class's own: Qwen2Tokenizer NFC() ['Ã', '©']
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 gguf==0.19.0 numpy==2.4.6
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON' 2> errors > out || { cat errors; exit 1; }
import gguf
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", *CONTROL]
writer = gguf.GGUFWriter("model.gguf", "qwen2")
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("qwen2")
writer.add_token_list(tokens)
writer.add_token_types([1] * (len(tokens) - len(CONTROL)) + [3] * len(CONTROL))
writer.add_token_merges(["a b"])
writer.add_eos_token_id(len(tokens) - 1)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
tokenizer = AutoTokenizer.from_pretrained(".", gguf_file="model.gguf")
from transformers import Qwen2Tokenizer

own = Qwen2Tokenizer({token: index for index, token in enumerate(tokens)}, [("a", "b")])
for name, one in {"from the GGUF file": tokenizer, "the class's own": own}.items():
    print(f"{name}: {type(one).__name__} {one.backend_tokenizer.normalizer} {one.tokenize(chr(101) + chr(0x301))}")
PYTHON
cat out
diff out - <<'EXPECTED'
from the GGUF file: Qwen2Tokenizer None ['e', 'Ì', 'ģ']
the class's own: Qwen2Tokenizer NFC() ['Ã', '©']
EXPECTED
