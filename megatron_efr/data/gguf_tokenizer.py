"""The byte-level BPE tokenizer that a GGUF file's metadata describe, as the model's own
tokenizer.json has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from megatron_efr.errors import UserError

_KEY = "tokenizer.ggml."
_REQUIRED = ("model", "pre", "tokens", "token_type", "merges", "eos_token_id")
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # of token_type
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@dataclass(frozen=True, slots=True)
class _Pre:
    """The values of `tokenizer.ggml.pre`: how its models cut text, by the tokenizer.json of their
    makers.
    """

    split: str | None = None  # a pattern, in place of GPT-2's
    digits: bool = False  # digits stand alone before that
    nfc: bool = False
    whole_words: bool = False  # a piece that is a token is not merged (`ignore_merges`)
    bos: bool = False  # a text begins with it unless the file says otherwise
    # False: the file's bos is the separator of documents in training, and no text has it
    has_bos: bool = True
    ends: tuple[str, ...] = ()  # that end a response as well, if the file's eos ends a turn


_PRE = {
    "gpt-2": _Pre(),
    "smollm": _Pre(digits=True),
    "qwen2": _Pre(_QWEN2, nfc=True, has_bos=False, ends=("<|im_end|>", "<|endoftext|>")),
    "deepseek-r1-qwen": _Pre(_QWEN2, nfc=True),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3"),
        _Pre(
            _LLAMA3,
            whole_words=True,
            bos=True,
            ends=("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
        ),
    ),
}


class GGUFTokenizer:
    """The tokenizer in `metadata`, and the ids that generation needs; messages name the file.

    UserError names the key that is missing or whose meaning is not known. llama.cpp's type of a
    token is all that the file says of added ones: control tokens become special, user-defined ones
    are found whole and are not special.
    """

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._where = where
        if missing := [_KEY + key for key in _REQUIRED if _KEY + key not in metadata]:
            raise UserError(f"{where}: the metadata lacks {', '.join(missing)}")
        self._of = {
            key.removeprefix(_KEY): value for key, value in metadata.items() if key.startswith(_KEY)
        }
        self._template = metadata.get("tokenizer.chat_template")
        if self._of["model"] != "gpt2":
            raise self._refusal("model", "is not supported; supported: 'gpt2', byte-level BPE")
        if self._of["pre"] not in _PRE:
            raise self._refusal(
                "pre", f"is a way to cut text that is not known; known are {', '.join(_PRE)}"
            )
        self._pre = _PRE[self._of["pre"]]
        self._tokens: list[str] = self._of["tokens"]
        if len(self._of["token_type"]) != len(self._tokens):
            raise UserError(f"{where}: {_KEY}token_type is not as long as {_KEY}tokens")
        self.size = len(self._tokens)

    def ids(self) -> dict[str, int | list[int]]:
        """bos, eos and pad of generation_config.json; `eos_token_id` has every token that ends a
        response.
        """
        found: dict[str, int | list[int]] = {}
        for name, key in {"bos": "bos_token_id", "pad": "padding_token_id"}.items():
            if key in self._of:
                self._token(key)
                found[f"{name}_token_id"] = self._of[key]
        eos = self._token("eos_token_id")
        ends = [self._of["eos_token_id"]]
        # a base model's eos ends documents, and is alone
        if self._pre.ends and eos == self._pre.ends[0]:
            ends += [self._tokens.index(end) for end in self._pre.ends[1:] if end in self._tokens]
        found["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        return found

    def build(self, positions: int) -> PreTrainedTokenizerFast:
        """The tokenizer with its chat template, for texts of at most `positions` tokens."""
        names = {"eos_token": self._token("eos_token_id")}
        for name, key in {
            "bos": "bos_token_id",
            "unk": "unknown_token_id",
            "pad": "padding_token_id",
        }.items():
            if key in self._of and (name != "bos" or self._pre.has_bos):
                names[f"{name}_token"] = self._token(key)
        made = PreTrainedTokenizerFast(
            tokenizer_object=self._backend(names.get("bos_token")),
            clean_up_tokenization_spaces=False,
            model_max_length=positions,
            **names,
        )
        made.chat_template = self._template
        return made

    def _backend(self, bos: str | None) -> Tokenizer:
        types = self._of["token_type"]
        # rows of the embedding that no token has are listed as [PAD151665], by older files as
        # user-defined
        used = [
            index for index, (token, kind) in enumerate(zip(self._tokens, types, strict=True))
            if kind != _UNUSED and token != f"[PAD{index}]"
        ]  # fmt: skip
        vocabulary = {self._tokens[index]: index for index in used}
        if len(vocabulary) != len(used):
            raise UserError(f"{self._where}: {_KEY}tokens holds a token twice")
        # byte-level BPE; some families look a word up whole before they merge
        merges = [tuple(merge.split(" ", 1)) for merge in self._of["merges"]]
        try:
            bpe = models.BPE(vocabulary, merges, ignore_merges=self._pre.whole_words)
        except Exception as error:  # tokenizers raises a bare one
            raise UserError(
                f"{self._where}: {_KEY}merges do not belong to {_KEY}tokens: {error}"
            ) from error
        # from text to bytes to tokens, and back
        made = Tokenizer(bpe)
        if self._pre.nfc:
            made.normalizer = normalizers.NFC()
        made.pre_tokenizer = self._pre_tokenizer()
        made.decoder = decoders.ByteLevel()
        made.post_processor = self._post_processor(bos)
        # tokens that are matched before BPE; control tokens alone are hidden from decoded text
        for kind in (_CONTROL, _USER_DEFINED):
            texts = [self._tokens[index] for index in used if types[index] == kind]
            made.add_tokens(
                [AddedToken(text, special=kind == _CONTROL, normalized=False) for text in texts]
            )
        return made

    def _pre_tokenizer(self) -> Any:
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self._pre.split is None)
        if self._pre.split is not None:
            return pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(self._pre.split), "isolated"), bytes_]
            )
        return (
            pre_tokenizers.Sequence([pre_tokenizers.Digits(True), bytes_])
            if self._pre.digits
            else bytes_
        )

    def _post_processor(self, bos: str | None) -> Any:
        if bos is None or not self._of.get("add_bos_token", self._pre.bos):
            return processors.ByteLevel(trim_offsets=False)
        return processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, self._of["bos_token_id"])],
        )

    def _token(self, key: str) -> str:
        index = self._of[key]
        if not isinstance(index, int) or not 0 <= index < len(self._tokens):
            raise self._refusal(key, f"is none of the {len(self._tokens)} tokens")
        return self._tokens[index]

    def _refusal(self, key: str, message: str) -> UserError:
        return UserError(f"{self._where}: {_KEY}{key} {self._of[key]!r} {message}")
