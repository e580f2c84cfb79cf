"""A tokenizer's chat template, tried on one question before any work: what it cannot do is said
with what would do.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from megatron_efr.errors import UserError

Messages = list[dict[str, str]]

_SENTINEL = "ANSWERBEGINSHERE"
_TELLS_DATE = "strftime_now"  # what a template calls
_DIRECTIVES = "aAbBcdfGHIjmMpSuUVwWxXyYzZeDFhRT"  # of strftime, glibc's too


class PromptError(UserError, ValueError):
    """A tokenizer, template or prompt that cannot be used; the message says what would be right."""


def tells_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if prompts of this chat template depend on a date."""
    return _TELLS_DATE in str(tokenizer.chat_template)


class Chat:
    """Writes conversations as the tokenizer's chat template has them, which is told `date`, or else
    today's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str | None = None) -> None:
        self._tokenizer, self._date = tokenizer, date
        self.where = f"{tokenizer.name_or_path}: the chat template"
        if not tokenizer.chat_template:
            raise PromptError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template; put a "
                "chat_template.jinja beside tokenizer_config.json (a base model's can be as short "
                "as the user's text alone)"
            )

    def write(self, conversations: list[Messages], generation: bool = True) -> list[str]:
        """The text of each conversation, with the assistant's tag at its end for `generation`.

        PromptError with the template's own words if it refuses, and with the line of a mistake in
        it.
        """
        try:
            template = self._tokenizer.get_chat_template()
            if self._date and _TELLS_DATE in template:
                template = _telling(datetime.fromisoformat(self._date)) + template
            texts: Any = self._tokenizer.apply_chat_template(
                conversations,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=generation,
            )
        except TemplateSyntaxError as error:
            raise PromptError(
                f"{self.where} is no Jinja template: line {error.lineno}: {error.message}"
            ) from error
        except TemplateError as error:  # its own raise_exception, or a name that is not defined
            raise PromptError(f"{self.where} refuses this conversation: {error.message}") from error
        # a template runs code: of several named ones none is default, a sum of text and none
        except Exception as error:
            raise PromptError(f"{self.where} cannot be used: {error}") from error
        return texts

    def check(self, first: Messages, other: Messages) -> None:
        """PromptError unless the template writes what a run needs of it.

        `first` and `other` are two conversations, alike but for the question in their last message.
        """
        system, user = first[:-1], first[-1:]
        text = self._with_system(first, user) if system else self.write([first])[0]
        if text == self.write([other])[0]:
            raise PromptError(
                f"{self.where} leaves the question out; it must write the user's message['content']"
            )
        if system and text == self._or_none(user):
            raise PromptError(
                f"prompt.system: {self.where} leaves it out; put its text into prompt.template, "
                "and prompt.system: null"
            )
        self._check_generation_prompt(first, text)

    def _with_system(self, conversation: Messages, user: Messages) -> str:
        try:
            return self.write([conversation])[0]
        except PromptError as error:
            if self._or_none(user) is None:
                raise  # it is not the system message's fault
            raise PromptError(
                f"prompt.system: {error}; put its text into prompt.template, and prompt.system: "
                "null"
            ) from error

    def _check_generation_prompt(self, conversation: Messages, prompt: str) -> None:
        """PromptError if the prompt lacks the tag that stands before an answer in a finished
        conversation.
        """
        finished = self._or_none(
            [*conversation, {"role": "assistant", "content": _SENTINEL}], generation=False
        )
        asked = self._or_none(conversation, generation=False)
        if finished is None or asked is None or asked != prompt or _SENTINEL not in finished:
            return
        tag = finished.partition(_SENTINEL)[0].removeprefix(asked)
        if tag.strip() and len(tag) < len(finished):
            raise PromptError(
                f"{self.where} ignores add_generation_prompt: its prompt ends without {tag!r}, "
                f"which stands before an answer; it must end with {{% if add_generation_prompt "
                f"%}}{tag}{{% endif %}}"
            )

    def added(self, conversation: Messages) -> str:
        """The text that the template writes between the assistant's tag and the model's own first
        token.

        The tag is what stands before an assistant turn's text in a finished conversation, found
        with a marker in that text's place. R1-Distill ends its generation prompt with `<think>\\n`,
        and a finished turn has no such thing. A template that opens `<think>` in both is caught by
        that word.
        """
        [prompt] = self.write([conversation])
        [finished] = self.write(
            [[*conversation, {"role": "assistant", "content": _SENTINEL}]], generation=False
        )
        head = finished.partition(_SENTINEL)[0]
        same = next(
            (i for i, (a, b) in enumerate(zip(head, prompt, strict=False)) if a != b), len(head)
        )
        if extra := prompt[same:]:
            return extra
        added = prompt.removeprefix(self.write([conversation], generation=False)[0])
        return added[added.index("<think") :] if "<think" in added else ""

    def _or_none(self, conversation: Messages, generation: bool = True) -> str | None:
        """The conversation's text; None if the template refuses it."""
        try:
            return self.write([conversation], generation)[0]
        except PromptError:
            return None


def _telling(day: datetime) -> str:
    """A macro in front of a chat template that takes the place of transformers' `strftime_now`, and
    tells `day`.

    A function cannot be handed to a template: transformers 5.23 makes a text of it.
    """
    directives = {
        f"%{flag}{letter}": day.strftime(f"%{flag}{letter}")
        for flag in ("", "-")
        for letter in _DIRECTIVES
    }
    texts = {"%%": "\0", **directives, "\0": "%"}
    told = "".join(f"|replace({directive!r}, {text!r})" for directive, text in texts.items())
    return "{%- macro strftime_now(format) -%}{{ format" + told + " }}{%- endmacro -%}"
