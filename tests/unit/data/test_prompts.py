"""Prompts: the chat template's own ids, what stands after the assistant tag, limits, vocabulary,
stop ids.
"""

import copy
import json
import shutil
from datetime import date, datetime
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from megatron_efr.config import PromptConfig, SftDataConfig
from megatron_efr.data.byte_model import BYTE_MODEL, byte_tokenizer
from megatron_efr.data.datasets import Problem
from megatron_efr.data.model_folder import CHAT_TEMPLATE, write_model_folder
from megatron_efr.data.prompts import (
    PromptError,
    Renderer,
    load_tokenizer,
    render,
    render_all,
    vocabulary_size,
)
from megatron_efr.data.readers import DatasetError
from megatron_efr.data.sft import load_sft
from megatron_efr.data.stop_tokens import stop_ids

# R1-Distill's template in small: the generation prompt opens the thinking, a finished turn drops
# it.
R1_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}<assistant>{{ "
    "m['content'].split('</think>')[-1] }}{{ eos_token }}{% else %}<user>{{ m['content'] }}{% "
    "endif %}{% endfor %}{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
# Qwen3's in small: a finished turn shows an empty thinking, the generation prompt leaves it to the
# model.
QWEN3_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<assistant><think>\n\n</think>\n\n{{ "
    "m['content'] }}{{ eos_token }}{% else %}<user>{{ m['content'] }}{% endif %}{% endfor %}{% if "
    "add_generation_prompt %}<assistant>{% endif %}"
)
ALWAYS_THINKS = CHAT_TEMPLATE.replace("<assistant>", "<assistant><think>\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("byte_model")
    write_model_folder(place, byte_tokenizer(), BYTE_MODEL)
    return place


@pytest.fixture
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


def problem(question: str = "1+1?", number: int = 1) -> Problem:
    return Problem(f"d/{number}", question, "2", 3, f"d.jsonl:{number}", "d")


def test_ids_are_the_templates_own_with_one_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    config = PromptConfig(system="Be brief.", template="Q: {question} \\boxed{{}}")
    prompt = render(problem("1+1? é"), tokenizer, config)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q: 1+1? é \\boxed{}"},
    ]
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert list(prompt.tokens) == expected
    assert prompt.tokens.count(tokenizer.bos_token_id) == 1
    assert prompt.text == "<bos><system>Be brief.<user>Q: 1+1? é \\boxed{}<assistant>"
    assert tokenizer.decode(prompt.tokens) == prompt.text
    assert (prompt.id, prompt.gold) == ("d/1", "2")
    assert prompt.meta == {
        "dataset": "d",
        "difficulty": 3,
        "where": "d.jsonl:1",
        "question": prompt.meta["question"],
    }
    assert prompt.meta["question"] in prompt.text


def test_a_template_that_tells_a_date_tells_the_configured_one(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    asking = copy.deepcopy(tokenizer)
    asking.chat_template = "{{ strftime_now('%d %b %Y') }}" + str(tokenizer.chat_template)
    plain = render(problem(), tokenizer, PromptConfig())
    dated = render(problem(), asking, PromptConfig(date="2020-02-29"))
    assert dated.text == "29 Feb 2020" + plain.text
    assert list(dated.tokens) == [
        *tokenizer.encode("29 Feb 2020", add_special_tokens=False),
        *plain.tokens,
    ]
    for form in ("%Y-%m-%d", "%A, %-d %B %y", "%H:%M %p 100%%d", "%c|%x|%X|%j"):
        told = "{% set d = strftime_now(" + repr(form) + ") %}{{ d }}|"
        asking.chat_template = told + str(tokenizer.chat_template)
        [(text, _)] = Renderer(asking, PromptConfig(date="2020-02-29")).render(["q"])
        assert text.startswith(datetime(2020, 2, 29).strftime(form) + "|<bos>")
    asking.chat_template = "{{ strftime_now('%d %b %Y') }}" + str(tokenizer.chat_template)
    today = render(problem(), asking, PromptConfig()).text
    assert today == f"{datetime.now():%d %b %Y}{plain.text}", "this test ran over midnight"


def test_a_date_is_a_day_however_yaml_reads_it() -> None:
    assert PromptConfig.model_validate({"date": date(2020, 2, 29)}).date == "2020-02-29"
    with pytest.raises(ValueError, match="date"):
        PromptConfig(date="29 Feb 2020")


def test_bos_adding_tokenizer_still_gives_one_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Llama-like tokenizers put a BOS before any text they encode; the template's is the only one
    here.
    """
    from tokenizers import processors

    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[bos]
    )
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    assert (
        render(problem(), tokenizer, PromptConfig(prefill="x")).tokens.count(tokenizer.bos_token_id)
        == 1
    )


def test_prefill_text_is_appended(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = render(problem(), tokenizer, PromptConfig())
    filled = render(problem(), tokenizer, PromptConfig(prefill="<think>\n"))
    assert filled.text == plain.text + "<think>\n"
    assert tokenizer.decode(filled.tokens[len(plain.tokens) :]) == "<think>\n"


@pytest.mark.parametrize(
    ("template", "extra"), [(R1_TEMPLATE, r"'<think>\\n'"), (ALWAYS_THINKS, r"'<think>\\n'")]
)
def test_prefill_none_refuses_a_template_that_thinks(
    tokenizer: PreTrainedTokenizerBase, template: str, extra: str
) -> None:
    tokenizer.chat_template = template
    assert render(problem(), tokenizer, PromptConfig(prefill="template")).text.endswith(
        "<assistant><think>\n"
    )
    with pytest.raises(
        PromptError, match=f"prefill: none, but the chat template .* writes {extra}"
    ):
        render(problem(), tokenizer, PromptConfig(prefill="none"))


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, QWEN3_TEMPLATE])
def test_prefill_none_accepts_a_bare_assistant_tag(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    tokenizer.chat_template = template
    config = PromptConfig(prefill="none", system="Think between <think> and </think>.")
    assert render(problem(), tokenizer, config).text.endswith("<assistant>")


def test_tokenizer_without_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    with pytest.raises(PromptError, match=r"has no chat template; put a chat_template\.jinja"):
        Renderer(tokenizer, PromptConfig())


def test_overlong_prompts_are_counted_or_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    problems = [problem("12"), problem("1" * 50, 2), problem("34", 3)]
    at_limit = len(render(problems[0], tokenizer, PromptConfig(template="{question}")).tokens)
    config = PromptConfig(template="{question}", max_tokens=at_limit)
    rendered = render_all(problems, tokenizer, config)
    assert [prompt.id for prompt in rendered.prompts] == ["d/1", "d/3"]
    assert rendered.overlong == 1
    strict = config.model_copy(update={"overlong": "error"})
    with pytest.raises(
        PromptError,
        match=rf"d\.jsonl:2: the prompt has {at_limit + 48} tokens, more than .* {at_limit}",
    ):
        render_all(problems, tokenizer, strict)
    with pytest.raises(PromptError, match="all 3 prompts are longer"):
        render_all(problems, tokenizer, config.model_copy(update={"max_tokens": 2}))


def test_missing_folder_and_missing_tokenizer(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(PromptError, match="no such model folder"):
        load_tokenizer(tmp_path / "none")
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(PromptError, match=r"no tokenizer here \(expected tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(PromptError, match="files cannot be loaded"):
        load_tokenizer(tmp_path)


def altered(folder: Path, place: Path, file: str, **changes: object) -> Path:
    """A copy of `folder` in `place` with keys of one JSON file changed."""
    copy = place / "model"
    shutil.copytree(folder, copy)
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | changes))
    return copy


def test_vocabulary_mismatch(folder: Path, tmp_path: Path) -> None:
    assert vocabulary_size(folder) == 272
    with pytest.raises(
        PromptError,
        match=r"vocabulary mismatch: .*'<assistant>' has id 261, but .* vocab_size is 261",
    ):
        load_tokenizer(altered(folder, tmp_path, "config.json", vocab_size=261))


def test_vocabulary_size_must_be_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="vocab_size is None"):
        vocabulary_size(altered(folder, tmp_path, "config.json", vocab_size=None))


@pytest.mark.parametrize(
    ("named", "expected"), [(7, (7, 258)), ([258, 9, 7], (7, 9, 258)), (None, (258,))]
)
def test_stop_ids_are_both_files_together(
    folder: Path, tmp_path: Path, named: object, expected: tuple[int, ...]
) -> None:
    place = altered(folder, tmp_path, "generation_config.json", eos_token_id=named)
    assert stop_ids(place, load_tokenizer(place)) == expected


def test_a_stop_id_that_only_config_json_names_counts(folder: Path, tmp_path: Path) -> None:
    place = altered(folder, tmp_path, "config.json", eos_token_id=[7, 261])
    (place / "generation_config.json").unlink()
    tokenizer = load_tokenizer(place)
    assert stop_ids(place, tokenizer) == tuple(sorted({7, 261, tokenizer.eos_token_id}))
    tokenizer.eos_token = None
    assert stop_ids(place, tokenizer) == (7, 261)


def test_no_stop_id_or_one_outside_the_vocabulary(folder: Path, tmp_path: Path) -> None:
    place = altered(folder, tmp_path, "generation_config.json", eos_token_id=272)
    tokenizer = load_tokenizer(place)
    with pytest.raises(
        PromptError,
        match=r"generation_config.json: .* eos token ids \[272\] are outside vocab_size 272",
    ):
        stop_ids(place, tokenizer)
    (place / "generation_config.json").unlink()
    place = altered(place, tmp_path / "silent", "config.json", eos_token_id=None)
    tokenizer.eos_token = None
    with pytest.raises(
        PromptError, match=r"neither the tokenizer nor generation_config.json nor config.json names"
    ):
        stop_ids(place, tokenizer)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("<eos>", "required, found '<eos>'; the tokenizer's id of it is "),
        ("</s>", "required, found '</s>'$"),
        ([[2]], r"required, found \[\[2\]\]$"),
        ([2, None], r"required, found \[2, None\]$"),
        ({"id": 2}, "required, found {'id': 2}$"),
        (2.0, "required, found 2.0$"),
        (True, "required, found True$"),
    ],
)
def test_a_stop_id_that_is_none(
    file: str, given: object, message: str, folder: Path, tmp_path: Path
) -> None:
    place = altered(folder, tmp_path, file, eos_token_id=given)
    with pytest.raises(
        PromptError, match=f"{file}: eos_token_id: a token id, or a list of them, is {message}"
    ):
        stop_ids(place, load_tokenizer(folder))


def test_sft_rows(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "sft.jsonl"
    rows = [{"question": "1+1", "response": "\\boxed{2}"}, {"question": "1" * 99, "response": "x"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PromptConfig(template="{question}", max_tokens=20)
    result = load_sft(SftDataConfig(path=str(path)), tokenizer, config)
    [sequence] = result.samples
    assert result.overlong == 1
    prompt = render(problem("1+1"), tokenizer, config)
    assert tuple(sequence.tokens[: sequence.prompt_length]) == prompt.tokens
    response = sequence.tokens[sequence.prompt_length :]
    assert response[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(response[:-1]) == "\\boxed{2}"
    path.write_text('{"question": "q", "response": "r<eos>"}\n{"question": "q"}\n')
    [ended] = load_sft(SftDataConfig(path=str(path), limit=1), tokenizer, config).samples
    assert ended.tokens.tolist().count(258) == 1  # an EOS that is already there is not doubled
    with pytest.raises(
        DatasetError,
        match=r"sft\.jsonl:2: no text in column 'response'; the row has columns question",
    ):
        load_sft(SftDataConfig(path=str(path)), tokenizer, config)
