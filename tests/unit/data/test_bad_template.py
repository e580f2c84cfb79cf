"""Chat templates that cannot be used, by hand and by chance: each ends in a sentence, before any
work.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_efr.config import PromptConfig
from megatron_efr.data.byte_model import BYTE_MODEL, byte_tokenizer
from megatron_efr.data.datasets import Problem
from megatron_efr.data.model_folder import CHAT_TEMPLATE, write_model_folder
from megatron_efr.data.prompts import load_tokenizer, render_all
from megatron_efr.errors import UserError

pytestmark = pytest.mark.alike
INPUTS = 200
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not "
    "supported') }}{% endif %}{% for m in messages %}{% set role = 'model' if m['role'] == "
    "'assistant' else m['role'] %}{{ '<user>' + role + '\n' + m['content'] | trim + '<eos>\n' "
    "}}{% endfor %}{% if add_generation_prompt %}<user>model\n{% endif %}"
)
LLAMA = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = "
    "messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}{% if "
    "(m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') "
    "}}{% endif %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system + '\n' if system "
    "and loop.first else '') + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token "
    "}}{% endif %}{% endfor %}"
)
BASE = "{{ messages[-1].content }}"
SYSTEM = "Be brief."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte_model") / "model"
    write_model_folder(folder, byte_tokenizer(), BYTE_MODEL)
    return folder


def read(folder: Path, template: Any, system: str | None = None, **prompt: Any) -> str | None:
    """The refusal of a folder with this chat template (a text, or tokenizer_config.json's), or
    None.
    """
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    file.unlink(missing_ok=True)
    settings = {
        key: value
        for key, value in json.loads(config.read_text()).items()
        if key != "chat_template"
    }
    if isinstance(template, str):
        file.write_text(template, encoding="utf-8")
    elif template is not None:
        settings["chat_template"] = template
    config.write_text(json.dumps(settings))
    problems = [
        Problem(f"d/{i}", f"What is {i}?", "2", None, f"d.jsonl:{i}", "d") for i in range(3)
    ]
    try:
        rendered = render_all(
            problems, load_tokenizer(folder), PromptConfig(system=system, **prompt)
        )
    except UserError as error:
        return str(error)
    assert all(f"What is {i}?" in p.text for i, p in enumerate(rendered.prompts))
    return None


@pytest.mark.parametrize("system", [None, SYSTEM])
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, LLAMA])
def test_templates_of_the_families_are_taken(
    template: str, system: str | None, model: Path
) -> None:
    assert read(model, template, system) is None


@pytest.mark.parametrize(
    "template",
    [
        GEMMA,
        BASE,
        "Question: {{ messages[0].content }}\nAnswer:",
        [
            {"name": "default", "template": CHAT_TEMPLATE},
            {"name": "tool_use", "template": "{{ tools }}"},
        ],
        CHAT_TEMPLATE.replace("assistant", "nobody"),  # that takes no finished conversation
        "{% for m in messages %}{{ m.content | trim }}{% if not loop.last %}\n{% endif %}{% "
        "endfor %}",
    ],
)
def test_so_are_those_without_a_system_message_or_a_tag(template: Any, model: Path) -> None:
    assert read(model, template) is None


USER = "{{ messages[-1]['content'] }}"
IGNORES = CHAT_TEMPLATE.partition("{% if add_generation_prompt")[0]
UNCONDITIONAL = (
    "{% for m in messages %}<user>{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% "
    "endfor %}"
)

TEMPLATES: list[tuple[str, Any, list[str]]] = [
    ("none", None, ["the tokenizer has no chat template; put a chat_template.jinja beside"]),
    ("empty", "", ["chat template"]),
    *[
        (f"syntax {text}", text, ["the chat template is no Jinja template: line 1"])
        for text in (
            "{{ messages", "{% for m in messages %}", "{% if x %}" + USER, "{% endfor %}",
            "{{ messages[0] }",
            "{% foo %}", "{{ messages | nofilter }}", "{{ 1 + }}", "{% set = 3 %}",
            "{{ 1 }}{% endif %}",
            "{{ messages is notest }}", "{% for in messages %}{% endfor %}", "{{ '", "{% block %}",
            "{# open",
            "{% macro %}{% endmacro %}", "{{ messages[0]['content' }}", "{% if %}{% endif %}",
            "{{ a b }}",
            "{% else %}",
        )
    ],
    ("a later line", "\n\n{{ messages", ["the chat template is no Jinja template: line 3"]),
    ("raise_exception", "{{ raise_exception('not for chat') }}",
        ["refuses this conversation: not for chat"]),
    ("roles", "{{ raise_exception('Only user and assistant roles') }}" + USER,
        ["Only user and assistant roles"]),
    ("an undefined name", "{{ nothing.content }}" + USER,
        ["the chat template", "'nothing' is undefined"]),
    ("an undefined call", "{{ today() }}" + USER, ["the chat template", "'today' is undefined"]),
    ("an undefined method", "{{ messages.first() }}" + USER,
        ["the chat template", "no attribute 'first'"]),
    ("a sum", "{{ messages[0].content + 1 }}",
        ["the chat template cannot be used: can only concatenate str"]),
    ("a division", "{{ 1 / 0 }}" + USER, ["the chat template cannot be used: division by zero"]),
    ("an index", "{{ messages[5].content.upper() }}", ["the chat template", "has no element 5"]),
    ("a private attribute", "{{ messages.__class__.__mro__ }}" + USER,
        ["the chat template", "unsafe"]),
    ("a range", "{% for i in range(10 ** 9) %}{% endfor %}" + USER,
        ["the chat template cannot be used", "too big"]),
    ("a loop over a number", "{% for i in 3 %}{% endfor %}" + USER,
        ["the chat template cannot", "not iterable"]),
    ("an include", "{% include 'x' %}" + USER, ["the chat template cannot be used: no loader"]),
    ("parts of a list", "{{ messages[-1].content[0].text.strip() }}",
        ["the chat template", "no attribute 'text'"]),
    ("a date of its own", "{{ strftime_now() }}" + USER, ["the chat template cannot be used"]),
    ("a filter's argument", "{{ messages | join(1, 2, 3) }}", ["the chat template cannot be used"]),
    ("no question", "You are a helper.",
        ["the chat template leaves the question out", "message['content']"]),
    ("a misspelt key", "{% for m in messages %}<user>{{ m.contents }}{% endfor %}",
        ["leaves the question out"]),
    ("a misspelt role", "{% for m in messages if m.role == 'human' %}{{ m.content }}{% endfor %}",
        ["leaves"]),
    ("the role alone", "{% for m in messages %}{{ m.role }}{% endfor %}",
        ["leaves the question out"]),
    ("the first words", "{{ messages[-1].content[:7] }}",
        ["the chat template leaves the question out"]),
    ("a shadowed name", "{% set messages = [] %}{% for m in messages %}{{ m.content }}{% endfor %}",
        ["leaves the"]),
    ("another's messages", "{% for m in conversation %}{{ m.content }}{% endfor %}",
        ["leaves the question "
        "out"]),
    ("blank", "  \n", ["the chat template leaves the question out"]),
    ("a comment", "{# {{ messages }} #}", ["the chat template leaves the question out"]),
    ("no tag", IGNORES, ["ignores add_generation_prompt", "'<assistant>'",
        "{% if add_generation_"]),
    ("a misspelt flag", CHAT_TEMPLATE.replace("add_generation_prompt", "generate"),
        ["ignores add_generation_prompt"]),
    ("the flag denied", CHAT_TEMPLATE.replace("if add_generation", "if false and add_generation"),
        ["ignores"]),
    ("ChatML without", "{% for m in messages %}<user>{{ m.role }}\n{{ m.content "
        "}}<eos>{% endfor %}", ["assistant\\n"]),
    ("names without default", [{"name": "rag", "template": USER}], ["the chat template cannot "
        "be used", "default"]),
    ("two names without", [{"name": "a", "template": USER}, {"name": "b", "template": USER}],
        ["cannot be used"]),
    ("a list of texts", ["a", "b"], ["tokenizer"]),
    ("names without templates", [{"name": "default"}], ["tokenizer"]),
    ("a number", 3, ["model"]),
    ("a default of none", [{"name": "default", "template": None}], ["model"]),
]  # fmt: skip

WITH_SYSTEM: list[tuple[str, str, list[str]]] = [
    ("refused", GEMMA, ["prompt.system: ", "refuses this conversation: System role not supported; "
        "put its text into"]),
    ("not alternating", LLAMA.replace("[1:]", ""),
        ["prompt.system: ", "roles must alternate", "prompt.system: null"]),
    ("left out", CHAT_TEMPLATE.replace("== 'system'", "== 'nobody'").replace("raise_exception",
        "string"), ["system"]),
    ("left out by a base", BASE, ["prompt.system: ", "the chat template leaves "
        "it out", "prompt.system: null"]),
    ("a user alone", "{% for m in messages if m.role == 'user' %}{{ "
        "m.content }}{% endfor %}", ["leaves it out"]),
    ("an unknown role", CHAT_TEMPLATE.replace("== 'system'", "== 'developer'"),
        ["prompt.system: ", "no role system"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "template", "words"), TEMPLATES, ids=[kind for kind, _, _ in TEMPLATES]
)
def test_a_template_that_cannot_be_used(
    kind: str, template: Any, words: list[str], model: Path
) -> None:
    message = read(model, template)
    assert message is not None
    assert [word for word in (str(model), *words) if word not in message] == [], message


@pytest.mark.parametrize(
    ("kind", "template", "words"), WITH_SYSTEM, ids=[kind for kind, _, _ in WITH_SYSTEM]
)
def test_a_template_that_does_not_take_the_system_message(
    kind: str, template: str, words: list[str], model: Path
) -> None:
    message = read(model, template, SYSTEM)
    assert message is not None
    assert [word for word in (str(model), *words) if word not in message] == [], message


def test_there_are_sixty_by_hand() -> None:
    assert len(TEMPLATES) + len(WITH_SYSTEM) >= 60


def test_a_question_that_the_template_refuses_is_named_with_its_line(model: Path) -> None:
    refusing = CHAT_TEMPLATE.replace(
        "<user>", "{% if '2' in message.content %}{{ raise_exception('no') }}{% endif %}<user>"
    )
    message = str(read(model, refusing.replace("'2'", "'is 2'")))
    assert message.startswith("d.jsonl:2: the question cannot be made a prompt: ")
    assert message.endswith("refuses this conversation: no")


# -- by chance
# --------------------------------------------------------------------------------------------------

PIECES = [
    "{{", "}}", "{%", "%}", "{#", "#}", "'", "[", "]", "(", ")", "|", "+", "~", "==", ".", "for",
    "in", "if", "endif",
    "endfor", "else", "message", "messages", "role", "content", "user", "assistant", "system",
    "bos_token", "none", "0",
    "loop", "not", "raise_exception", "add_generation_prompt", "set", "trim", "<assistant>", "\n",
    " ", "-", "é", "\\",
]  # fmt: skip


def spoilt(text: str, rng: random.Random) -> str:
    """A template with pieces taken out, put in, or exchanged."""
    for _ in range(rng.randrange(1, 4)):
        piece = rng.choice([p for p in PIECES if p in text] or [""])
        at = rng.choice([i for i in range(len(text) + 1) if text.startswith(piece, i)])
        text = (
            text[:at] + rng.choice(["", "", *PIECES]) + text[at + len(piece) * rng.randrange(2) :]
        )
    return text


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, GEMMA, LLAMA], ids=["ours", "gemma", "llama"])
def test_no_template_ends_in_a_traceback(template: str, model: Path, tmp_path: Path) -> None:
    rng, refused, folder = random.Random(template), 0, tmp_path / "model"
    shutil.copytree(model, folder)
    for turn in range(INPUTS // 3 + 1):
        spoiling = spoilt(template, rng)
        message = read(
            folder,
            spoiling,
            SYSTEM if turn % 3 == 0 else None,
            prefill=rng.choice(["template", "none"]),
        )
        refused += message is not None
        assert message is None or str(folder) in message, (spoiling, message)
    assert refused >= INPUTS // 9
