"""Renders problems into token ids with the tokenizer's own chat template, and reads a model
folder's vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_efr.config import PromptConfig
from megatron_efr.config.json_object import read_object
from megatron_efr.data.chat import Chat, Messages
from megatron_efr.data.chat import PromptError as PromptError
from megatron_efr.data.datasets import Problem
from megatron_efr.types import Prompt

_BATCH = 1024


def load_tokenizer(
    folder: str | Path, config: Mapping[str, Any] | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder; never looks on the hub. PromptError when the folder
    or files are missing.

    Checks that no token id reaches config.json's `vocab_size`, which is the model's true
    vocabulary. `config` is that file's content, if it has been read.
    """
    place = model_folder(folder)
    # tokenizer.json says all. AutoTokenizer would replace parts of it with what transformers' class
    # for the model type hard-codes (splitting and normalisation, for every Qwen2 folder), whatever
    # tokenizer was trained.
    kind = PreTrainedTokenizerFast if (place / "tokenizer.json").is_file() else AutoTokenizer
    if not any(
        (place / name).is_file()
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    ):
        raise PromptError(
            f"{place}: no tokenizer here (expected tokenizer.json and tokenizer_config.json)"
        )
    try:
        tokenizer = kind.from_pretrained(str(place), local_files_only=True)
    except Exception as error:  # tokenizers raises a bare Exception for a file it cannot read
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (place / name).is_file():
                read_object(place / name, PromptError)
        raise PromptError(f"{place}: the tokenizer's files cannot be loaded: {error}") from error
    check_vocabulary(tokenizer, vocabulary_size(place, config), str(place))
    return tokenizer


def read_config(folder: str | Path) -> dict[str, Any]:
    """The content of a model folder's config.json; PromptError if there is none."""
    path = model_folder(folder) / "config.json"
    if not path.is_file():
        raise PromptError(f"{path}: no such file; a model folder has a config.json")
    return read_object(path, PromptError)


def vocabulary_size(folder: str | Path, config: Mapping[str, Any] | None = None) -> int:
    """config.json's `vocab_size`: rows of the embedding, which may exceed the tokenizer's
    length. `config` is that file's content, if it has been read.
    """
    path = model_folder(folder) / "config.json"
    size = (read_config(folder) if config is None else config).get("vocab_size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise PromptError(f"{path}: vocab_size is {size!r}, expected a positive integer")
    return size


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str) -> None:
    """PromptError when the tokenizer can produce an id that the model has no embedding for."""
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise PromptError(
            f"{where}: vocabulary mismatch: the tokenizer's token {token!r} has id {largest}, but "
            f"config.json's vocab_size is {vocab_size}; tokenizer and model do not belong together"
        )


@dataclass(frozen=True, slots=True)
class Rendered:
    """Prompts that fit, in the order of their problems, and the problems that were longer than
    `prompt.max_tokens`.
    """

    prompts: list[Prompt]
    left_out: list[Problem]

    @property
    def overlong(self) -> int:
        return len(self.left_out)


class Renderer:
    """One tokenizer and one PromptConfig, checked against each other when built."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self._chat = Chat(tokenizer, config.date)
        self._chat.check(self._messages("1 + 1"), self._messages("2 + 2"))
        if config.prefill == "none" and (added := self._chat.added(self._messages("1 + 1"))):
            raise PromptError(
                f"prompt.prefill: none, but the chat template of {tokenizer.name_or_path} writes "
                f"{added!r} after the assistant tag; set prefill: template to keep it, or take it "
                "out of the folder's chat template"
            )
        self._suffix = "" if config.prefill in ("template", "none") else config.prefill
        self._suffix_ids: list[int] = (
            tokenizer.encode(self._suffix, add_special_tokens=False) if self._suffix else []
        )

    def render(
        self, questions: Sequence[str], places: Sequence[str] = ()
    ) -> list[tuple[str, tuple[int, ...]]]:
        """(text, token ids) of each question's prompt, ready for the model to go on from.

        The ids are the chat template's own: its text holds the BOS if the model wants one, so none
        is added. PromptError for a question that template or tokenizer cannot take, by its place
        ("file:line") if given.
        """
        results = []
        for start in range(0, len(questions), _BATCH):
            batch = questions[start : start + _BATCH]
            try:
                results += self._render(batch)
            # tokenizers raises whatever it likes; which question it is of shows one alone
            except Exception:
                for i, question in enumerate(batch, start):
                    self._render_one(question, places[i] if places else repr(question[:60]))
                raise
        for i, (_, ids) in enumerate(results):
            if not ids:
                raise PromptError(
                    f"{places[i] if places else repr(questions[i][:60])}: the prompt has no tokens"
                )
        return results

    def _render(self, questions: Sequence[str]) -> list[tuple[str, tuple[int, ...]]]:
        texts = self._chat.write([self._messages(question) for question in questions])
        batch: Any = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
        pairs = zip(texts, batch["input_ids"], strict=True)
        return [(text + self._suffix, (*ids, *self._suffix_ids)) for text, ids in pairs]

    def _render_one(self, question: str, place: str) -> None:
        try:
            self._render([question])
        except Exception as error:
            raise PromptError(f"{place}: the question cannot be made a prompt: {error}") from error

    def _messages(self, question: str) -> Messages:
        system = (
            []
            if self.config.system is None
            else [{"role": "system", "content": self.config.system}]
        )
        return [
            *system,
            {"role": "user", "content": self.config.template.format(question=question)},
        ]


def render(problem: Problem, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> Prompt:
    """One problem as a prompt, whatever its length; for many, `render_all`."""
    [(text, tokens)] = Renderer(tokenizer, config).render([problem.question])
    return _prompt(problem, text, tokens)


def render_all(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    config: PromptConfig,
    behind: str = "",
) -> Rendered:
    """Every problem as a prompt, with the text `behind` its question.

    Those over `config.max_tokens` are counted and left out, or an error, as configured.

    PromptError also when no prompt is left.
    """
    questions, places = (
        [problem.question + behind for problem in problems],
        [problem.where for problem in problems],
    )
    rendered = Renderer(tokenizer, config).render(questions, places)
    prompts, left_out = [], []
    for problem, (text, tokens) in zip(problems, rendered, strict=True):
        if fits(len(tokens), config, problem.where):
            prompts.append(_prompt(problem, text, tokens))
        else:
            left_out.append(problem)
    if not prompts:
        raise PromptError(
            f"all {len(problems)} prompts are longer than prompt.max_tokens = {config.max_tokens}"
        )
    return Rendered(prompts, left_out)


def fits(length: int, config: PromptConfig, where: str) -> bool:
    """True if a prompt of `length` tokens may be used; PromptError if it may not and
    `prompt.overlong` is error.
    """
    if length <= config.max_tokens:
        return True
    if config.overlong == "error":
        raise PromptError(
            f"{where}: the prompt has {length} tokens, more than prompt.max_tokens = "
            f"{config.max_tokens}; raise that, or set prompt.overlong: skip"
        )
    return False


def _prompt(problem: Problem, text: str, tokens: tuple[int, ...]) -> Prompt:
    meta = {
        "dataset": problem.dataset,
        "difficulty": problem.difficulty,
        "where": problem.where,
        "question": problem.question,
    }
    return Prompt(id=problem.id, tokens=tokens, text=text, gold=problem.gold, meta=meta)


def model_folder(folder: str | Path) -> Path:
    """`folder` as a path; PromptError if there is none."""
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise PromptError(
            f"{place}: no such model folder (expected one with config.json and a tokenizer)"
        )
    return place
