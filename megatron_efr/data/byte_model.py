"""A byte-level tokenizer and a small Qwen2 to go with it, for real text if no downloaded model is
at hand.

python -m megatron_efr.data.byte_model --out runs/byte_model
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_efr.data.model_folder import (
    ASSISTANT,
    BOS,
    EOS,
    PAD,
    SYSTEM,
    USER,
    ModelSize,
    special_tokens,
    write_model_folder,
)

# More rows than the tokenizer has tokens, as in Qwen's own models.
BYTE_MODEL = ModelSize(
    vocab=272, hidden=64, layers=2, heads=4, kv_heads=2, intermediate=192, positions=4096
)


def byte_tokenizer() -> Tokenizer:
    """One token for each of the 256 bytes, then the special tokens; any UTF-8 text round-trips."""
    # the 256 characters that stand for bytes
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special_tokens([PAD, BOS, EOS, SYSTEM, USER, ASSISTANT]))
    return backend


def main() -> None:
    """Write the folder named by --out."""
    parser = argparse.ArgumentParser(
        description="Write a small random Qwen2's folder with a byte-level tokenizer."
    )
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    folder = parser.parse_args().out
    write_model_folder(folder, byte_tokenizer(), BYTE_MODEL)
    print(
        f"{folder}: Qwen2 of {BYTE_MODEL.layers} layers, {BYTE_MODEL.vocab} tokens; use it with "
        "model.init: random"
    )


if __name__ == "__main__":
    main()
