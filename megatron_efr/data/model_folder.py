"""Writes the Hugging Face folder of a small Qwen2 without weights: config, tokenizer, chat
template, generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config

PAD, BOS, EOS, SYSTEM, USER, ASSISTANT = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<system>",
    "<user>",
    "<assistant>",
)

# The whole conversation, BOS included, is the template's, as in the models of the R1-Distill
# family.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}<system>{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}<user>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<assistant>{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no role ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes of a Qwen2; the defaults have 0.13 M parameters at 32 tokens."""

    vocab: int = 32
    hidden: int = 64
    layers: int = 3
    heads: int = 4
    kv_heads: int = 4
    intermediate: int = 192
    positions: int = 512
    tied: bool = True


def special_tokens(names: Sequence[str]) -> list[AddedToken]:
    """Tokens found in text before anything else, and left out of decoded text."""
    return [AddedToken(name, special=True, normalized=False) for name in names]


def write_model_folder(folder: Path, backend: Tokenizer, size: ModelSize) -> None:
    """Write config.json, generation_config.json and the tokenizer's files; weights are drawn when
    training starts.

    `backend` must know the special tokens above. The bytes depend on nothing but the arguments.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # tokenizer and chat template
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,  # "17; wait" must come back as it went in
        model_max_length=size.positions,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(str(folder))
    # config.json and generation_config.json, with the same special tokens
    ids: dict[str, Any] = {
        "bos_token_id": backend.token_to_id(BOS),
        "eos_token_id": backend.token_to_id(EOS),
        "pad_token_id": backend.token_to_id(PAD),
    }
    config = Qwen2Config(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.positions,
        tie_word_embeddings=size.tied,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        architectures=["Qwen2ForCausalLM"],
        dtype="float32",
        **ids,
    )
    config.save_pretrained(str(folder))
    # sampled from the model's own distribution, as training samples
    GenerationConfig(**ids, do_sample=True, temperature=1.0).save_pretrained(str(folder))
