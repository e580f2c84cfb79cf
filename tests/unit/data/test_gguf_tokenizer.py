"""Tokenizers of GGUF files: cut as their makers cut, with their special tokens and their ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, Qwen2Tokenizer

from megatron_efr import import_gguf
from megatron_efr.data.gguf_tokenizer import GGUFTokenizer
from megatron_efr.data.prompts import load_tokenizer
from megatron_efr.data.stop_tokens import stop_ids
from tests.gguf_files import MERGES, ROWS, vocabulary, write_model
from tests.unit.test_import_gguf import small

pytestmark = pytest.mark.alike


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder imported for each way to cut text."""
    found = {}
    for pre, family in {
        "smollm": "llama",
        "qwen2": "qwen2",
        "deepseek-r1-qwen": "qwen2",
        "llama-bpe": "llama",
    }.items():
        place = tmp_path_factory.mktemp("gguf")
        added = {"add_bos_token": True} if pre == "deepseek-r1-qwen" else {}
        file = write_model(
            place / "x.gguf", small(place / "model", family), pre=pre, tokenizer=added
        )
        import_gguf.import_gguf(file, place / "out")
        found[pre] = place / "out"
    return found


def pieces(folder: Path, text: str) -> list[str]:
    tokenizer = load_tokenizer(folder)
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])  # type: ignore[return-value]


def test_digits_stand_alone_in_smollm(folders: dict[str, Path]) -> None:
    assert pieces(folders["smollm"], "a  55 ap") == ["a", "ĠĠ", "5", "5", "Ġa", "p"]
    assert pieces(folders["smollm"], "55 55") == ["5", "5", "Ġ", "5", "5"]


@pytest.mark.parametrize(
    "text", ["e\u0301 caf\u00e9", "a  55 apples", " in\n\n x", "I'LL <think>x<|im_end|>", "xyz"]
)
def test_qwen2_cuts_as_its_own_class_does(folders: dict[str, Path], text: str) -> None:
    tokens, types = vocabulary("qwen2")
    vocab = {token: index for index, token in enumerate(tokens) if types[index] == 1}
    own = Qwen2Tokenizer(vocab, [tuple(merge.split()) for merge in MERGES])
    own.add_tokens([token for index, token in enumerate(tokens) if types[index] in (3, 4)])
    assert pieces(folders["qwen2"], text) == own.convert_ids_to_tokens(own(text)["input_ids"])
    assert (
        AutoTokenizer.from_pretrained(folders["qwen2"])(text)["input_ids"]
        == load_tokenizer(folders["qwen2"])(text)["input_ids"]
    )


def test_llama3_takes_three_digits_whole_words_and_a_beginning(folders: dict[str, Path]) -> None:
    assert pieces(folders["llama-bpe"], "xyz 55555") == [
        "<|begin_of_text|>",
        "xyz",
        "Ġ",
        *("55", "5", "55"),
    ]
    assert pieces(folders["qwen2"], "xyz") == ["x", "y", "z"]


def test_special_tokens_outside_the_byte_alphabet_stay_whole(folders: dict[str, Path]) -> None:
    found = pieces(folders["deepseek-r1-qwen"], "<｜User｜>a<think>")
    assert found == ["<｜begin▁of▁sentence｜>", "<｜User｜>", "a", "<think>"]
    tokenizer = load_tokenizer(folders["deepseek-r1-qwen"])
    assert (
        tokenizer.decode(tokenizer("<｜User｜>a<think>é")["input_ids"], skip_special_tokens=True)
        == "a<think>é"
    )


@pytest.mark.parametrize(
    ("pre", "bos", "ends"),
    [
        ("smollm", "<|im_start|>", ["<|im_end|>"]),
        ("qwen2", None, ["<|im_end|>", "<|endoftext|>"]),
        ("deepseek-r1-qwen", "<｜begin▁of▁sentence｜>", ["<｜end▁of▁sentence｜>"]),
        ("llama-bpe", "<|begin_of_text|>", ["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"]),
    ],
)
def test_ends_and_beginning(
    folders: dict[str, Path], pre: str, bos: str | None, ends: list[str]
) -> None:
    tokens, types = vocabulary(pre)
    tokenizer = load_tokenizer(folders[pre])
    assert tokenizer.bos_token == bos
    assert len(tokenizer) == sum(kind != 5 for kind in types)  # rows without a token are no tokens
    assert tokenizer.chat_template
    assert tokenizer.model_max_length in (512, 16384)
    generation = json.loads((folders[pre] / "generation_config.json").read_text())
    ids = [tokens.index(end) for end in ends]
    assert generation["eos_token_id"] == (ids if len(ids) > 1 else ids[0])
    assert json.loads((folders[pre] / "config.json").read_text())["eos_token_id"] == ids[0]
    assert stop_ids(folders[pre], tokenizer) == tuple(sorted(ids))


def test_a_base_model_ends_documents_alone() -> None:
    tokens, _ = vocabulary("qwen2")
    of = {"model": "gpt2", "pre": "qwen2", "tokens": tokens, "token_type": [1] * ROWS, "merges": []}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in of.items()}
    metadata["tokenizer.ggml.eos_token_id"] = tokens.index("<|endoftext|>")
    assert GGUFTokenizer(metadata, "x").ids() == {"eos_token_id": tokens.index("<|endoftext|>")}
