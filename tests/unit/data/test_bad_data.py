"""Data files that cannot be used, by hand and by chance: each ends in a sentence that names the
file.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from transformers import PreTrainedTokenizerBase

from megatron_efr.config import DatasetConfig, PromptConfig, SftDataConfig
from megatron_efr.data.byte_model import BYTE_MODEL, byte_tokenizer
from megatron_efr.data.datasets import load_problems
from megatron_efr.data.model_folder import write_model_folder
from megatron_efr.data.prompts import load_tokenizer, render_all
from megatron_efr.data.sft import load_sft
from megatron_efr.errors import UserError

pytestmark = pytest.mark.alike

INPUTS = 200
ROWS = [
    {"question": f"{i}+1?", "answer": str(i + 1), "response": f"It is {i + 1}.", "id": i}
    for i in range(4)
]
LINES = [json.dumps(row) + "\n" for row in ROWS]
GOOD = "".join(LINES)
ARRAY = json.dumps(ROWS, indent=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("byte_model")
    write_model_folder(folder, byte_tokenizer(), BYTE_MODEL)
    return load_tokenizer(folder)


def read(
    path: Path, tokenizer: PreTrainedTokenizerBase, sft: bool = False, **options: Any
) -> str | None:
    """The refusal of the file's problems (or rows to learn from) as prompts; None if there is
    none.
    """
    prompt = PromptConfig(overlong="error", max_tokens=4096)
    try:
        if sft:
            load_sft(SftDataConfig(path=str(path), **options), tokenizer, prompt)
        else:
            rendered = render_all(
                load_problems(DatasetConfig(path=str(path), **options)), tokenizer, prompt
            )
            json.dumps(
                [[p.text, p.gold, p.meta["question"]] for p in rendered.prompts], ensure_ascii=False
            ).encode()
    except UserError as error:
        return str(error)
    return None


def parquet(*rows: dict[str, Any]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), sink)
    return sink.getvalue().to_pybytes()


def with_line(line: str) -> str:
    """Two good rows, and `line` as the third."""
    return "".join(LINES[:2]) + line + "\n" + LINES[3]


FILES: list[tuple[str, str | bytes, list[str]]] = [
    ("a.jsonl", "", ["a.jsonl: holds no rows"]),
    ("a.jsonl", "\n \n\t\n", ["a.jsonl: holds no rows"]),
    ("a.json", "", ["a.json: holds no rows"]),
    ("a.json", "[]", ["a.json: holds no rows"]),
    ("a.parquet", parquet(ROWS[0])[:0], ["a.parquet: cannot be read as parquet"]),
    ("a.jsonl", with_line('{"question": "1", "answer": "2"'), ["a.jsonl:3: not valid JSON"]),
    ("a.jsonl", with_line("{'question': '1', 'answer': '2'}"),
        ["a.jsonl:3: not valid JSON", "column 2"]),
    ("a.jsonl", with_line('{"question": "1", "answer": "2"},'),
        ["a.jsonl:3: not valid JSON: Extra data"]),
    ("a.jsonl", with_line("half"), ["a.jsonl:3: not valid JSON"]),
    ("a.jsonl", with_line("[1, 2]"), ["a.jsonl:3: expected an object", "found list"]),
    ("a.jsonl", with_line('"text"'), ["a.jsonl:3: expected an object", "found str"]),
    ("a.jsonl", with_line("null"), ["a.jsonl:3: expected an object", "found NoneType"]),
    ("a.jsonl", with_line("{}"), ["a.jsonl:3: no question", "the row has no columns"]),
    ("a.jsonl", with_line('{"question": "1"}'),
        ["a.jsonl:3: no answer", "the row has columns question"]),
    ("a.jsonl", with_line('{"answer": "1"}'),
        ["a.jsonl:3: no question", "the row has columns answer"]),
    ("a.jsonl", with_line('{"Question": "1", "Answer": "2"}'),
        ["a.jsonl:3: no question", "columns Question, Answer"]),
    ("a.jsonl", with_line('{"question": "", "answer": "2"}'),
        ["a.jsonl:3: the question", "is empty"]),
    ("a.jsonl", with_line('{"question": " ", "answer": "2"}'),
        ["a.jsonl:3: the question", "is empty"]),
    ("a.jsonl", with_line('{"question": null, "answer": "2"}'),
        ["a.jsonl:3: the question", "is null"]),
    ("a.jsonl", with_line('{"question": "1", "answer": null}'),
        ["a.jsonl:3: the answer in column 'answer' is null"]),
    ("a.jsonl", with_line('{"question": ["1"], "answer": "2"}'),
        ["a.jsonl:3: the question", "a list, not text"]),
    ("a.jsonl", with_line('{"question": {"en": "1"}, "answer": "2"}'),
        ["a.jsonl:3: the question", "a dict, not text"]),
    ("a.jsonl", with_line('{"question": "1", "answer": ["2"]}'),
        ["a.jsonl:3: the answer", "a list, not text"]),
    ("a.jsonl", with_line('{"question": "1", "answer": {"a": 1}}'),
        ["a.jsonl:3: the answer", "a dict, not text"]),
    ("a.jsonl", with_line('{"question": "1", "answer": true}'),
        ["a.jsonl:3: the answer", "boolean true, not text"]),
    ("a.jsonl", with_line('{"question": "\\ud800", "answer": "2"}'),
        ["a.jsonl:3: \\ud800 is half a character"]),
    ("a.jsonl", with_line('{"question": "1", "answer": "\\udc00"}'),
        ["a.jsonl:3: \\udc00 is half a character"]),
    ("a.jsonl", with_line('{"question": "1", "answer": "2", "id": "\\ud800"}'),
        ["a.jsonl:3: \\ud800 is half a char"]),
    ("a.jsonl", with_line('{"question": "1", "answer": "#### "}'),
        ["a.jsonl:3: a gsm8k answer ends with '####"]),
    ("a.jsonl", with_line('{"question": "1", "answer": "2", "answer": 3}'),
        ["a.jsonl:3: the key 'answer' occurs"]),
    ("a.jsonl", with_line('{"question": "1", "answer": "2", "m": {"a": 1, "a": 1}}'),
        ["a.jsonl:3: the key 'a'"]),
    ("a.json", '[\n{"question": "1", "answer": "2"},\n{"id": 1, "id": 1}]',
        ["a.json:3: the key 'id' occurs twice"]),
    ("a.jsonl", with_line("[" * 5000), ["a.jsonl:3: not JSON that can be read"]),
    ("a.jsonl", with_line('{"answer": ' + "9" * 5000 + "}"),
        ["a.jsonl:3: not JSON that can be read"]),
    ("a.jsonl", GOOD.encode() + b'{"question": "\xe9"}\n',
        ["a.jsonl:5: cannot be read: not UTF-8 (the byte 0xe9)"]),
    ("a.jsonl", GOOD.encode("utf-16"), ["a.jsonl: cannot be read: its content is "
        "UTF-16; save it as UTF-8"]),
    ("a.jsonl", gzip.compress(GOOD.encode()),
        ["a.jsonl: cannot be read: its content is gzip; unpack it"]),
    ("a.jsonl", zstandard.compress(GOOD.encode()),
        ["a.jsonl: cannot be read: its content is zstandard; unpack it"]),
    ("a.jsonl", b"BZh91AY", ["a.jsonl: cannot be read: its content is bzip2"]),
    ("a.jsonl", b"\xfd7zXZ\0", ["a.jsonl: cannot be read: its content is xz"]),
    ("a.jsonl", b"PK\x03\x04rest", ["a.jsonl: cannot be read: its content is a zip archive"]),
    ("a.jsonl", parquet(*ROWS), ["a.jsonl: cannot be read: its content is parquet; "
        "rename it to .parquet"]),
    ("a.jsonl", b"ARROW1\0\0", ["a.jsonl: cannot be read: its content is an Arrow table"]),
    ("a.jsonl", "version https://git-lfs.github.com/spec/v1\n",
        ["its content is a git-lfs pointer", "git lfs pull"]),
    ("a.parquet", "version https://git-lfs.github.com/spec/v1\n",
        ["a.parquet: cannot", "a git-lfs pointer"]),
    ("a.jsonl", "<!DOCTYPE html><html>", ["a.jsonl: cannot be read: its content is a web page"]),
    ("a.jsonl", ARRAY, ["a.jsonl:1: not valid JSON"]),
    ("a.json", ARRAY[:-1], ["a.json:", "not valid JSON"]),
    ("a.json", ARRAY + "]", ["a.json:26: not valid JSON: ']' after the array's end"]),
    ("a.json", ARRAY + ARRAY, ["a.json:26: not valid JSON", "after the array's end"]),
    ("a.json", ARRAY.replace("},", "}", 1), ["a.json:2: not valid JSON: expected ',' or ']'"]),
    ("a.json", "[1]", ["a.json:1: expected an object", "found int"]),
    ("a.json", "[\n[" * 3000, ["a.json:2: not JSON that can be read"]),
    ("a.json", '[{"question": "1",\n "answer": }]', ["a.json:2: not valid JSON: Expecting value"]),
    ("a.json", '[\n{"question": "\\ud8ab", "answer": "1"}]',
        ["a.json:2: \\ud8ab is half a character"]),
    ("a.json", json.dumps({"data": ROWS}), ["a.json:1: no question", "the row has columns data"]),
    ("a.json", json.dumps({"data": ROWS}, indent=1), ["a.json:1: not valid JSON"]),
    ("a.json", json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}),
        ["a.json:1: the question", "a list"]),
    ("a.parquet", GOOD, ["a.parquet: cannot be read as parquet"]),
    ("a.parquet", parquet(*ROWS)[:-100], ["a.parquet: cannot be read as parquet"]),
    ("a.parquet", b"PAR1" + b"\0" * 100 + b"PAR1", ["a.parquet: cannot be read as parquet"]),
    ("a.parquet", parquet({"question": ["1"], "answer": "2"}),
        ["a.parquet:row 1: the question", "a list, not text"]),
    ("a.parquet", parquet({"q": "1", "answer": "2"}),
        ["a.parquet:row 1: no question", "columns q, answer"]),
    ("a.parquet", parquet({"question": b"1", "answer": "2"}),
        ["a.parquet:row 1: the question", "a bytes, not text"]),
    ("a.parquet", parquet(*ROWS, {"question": "1"}),
        ["a.parquet:row 5: the answer in column 'answer' is null"]),
    ("a.csv", "question,answer\n1,2\n", ["a.csv: cannot tell its kind by its name; "
        "expected one of .jsonl"]),
    ("a.jsonl.gz", gzip.compress(GOOD.encode()), ["a.jsonl.gz: cannot tell its kind by its name"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "words"), FILES)
def test_a_file_that_cannot_be_used(
    name: str,
    content: str | bytes,
    words: list[str],
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = read(path, tokenizer)
    assert message is not None
    assert [word for word in words if word not in message] == [], message
    assert str(tmp_path) in message


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"question": "1"}, "no text in column 'response'; the row has columns question"),
        ({"question": "1", "response": ""}, "no text in column 'response', but an empty one"),
        ({"question": "1", "response": ["2"]}, "no text in column 'response', but a list"),
        ({"question": {"a": 1}, "response": "2"}, "no text in column 'question', but a dict"),
        ({"question": 1, "response": "2"}, "no text in column 'question', but a int"),
        (
            {"messages": [], "response": "2"},
            "no text in column 'question'; the row has columns messages, response",
        ),
    ],
)
def test_a_row_that_nothing_can_be_learnt_from(
    row: dict[str, Any], found: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + json.dumps(row) + "\n")
    assert f"{path}:5: {found}" in str(read(path, tokenizer, sft=True))


def test_there_are_sixty_by_hand() -> None:
    assert len(FILES) >= 60


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b"\xef\xbb\xbf" + GOOD.encode()),
        ("a.jsonl", GOOD.replace("\n", "\r\n")),
        ("a.jsonl", GOOD.replace("\n", "\r")),
        ("a.jsonl", GOOD.replace("\n", "\n\n") + " "),
        ("a.json", b"\xef\xbb\xbf" + ARRAY.replace("\n", "\r\n").encode()),
        ("a.json", GOOD),
        ("a.jsonl", GOOD + '{"question": "\\ud83d\\ude00?", "answer": 1, "id": 0}\n'),
        ("a.parquet", parquet(*ROWS)),
    ],
)
def test_files_of_every_editor_give_the_same_problems(
    name: str, content: str | bytes, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read(path, tokenizer) is None
    problems = load_problems(DatasetConfig(path=str(path)))
    assert [(p.question, p.gold) for p in problems[:4]] == [
        (row["question"], row["answer"]) for row in ROWS
    ]
    assert len({p.id for p in problems}) == len(problems), "one id twice"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda folder: (folder / "state.json").unlink(),
            ["saved: a folder, but not one that datasets' save_to_disk"],
        ),
        (
            lambda folder: (folder / "state.json").write_text("{"),
            ["saved: a folder of save_to_disk that is damaged"],
        ),
        (
            lambda folder: (folder / "dataset_info.json").write_text("[]"),
            ["saved: a folder of save_to_disk"],
        ),
        (
            lambda folder: next(folder.glob("*.arrow")).write_bytes(b"x"),
            ["saved: a folder of save_to_disk"],
        ),
        (lambda folder: next(folder.glob("*.arrow")).unlink(), ["saved: a folder"]),
        (
            lambda folder: [p.unlink() for p in folder.iterdir()],
            ["saved: a folder, but not one that datasets'"],
        ),
    ],
)
def test_a_saved_folder_that_is_damaged(
    spoil: Callable[[Path], object],
    words: list[str],
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder))
    assert read(folder, tokenizer) is None
    spoil(folder)
    message = str(read(folder, tokenizer))
    assert [word for word in words if word not in message] == [], message


def test_dates_that_a_library_made_of_answers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A JSON file's answers that look like dates come as such from datasets, and as text from the
    file.
    """
    file, folder = tmp_path / "days.jsonl", tmp_path / "days"
    rows = [{"question": f"{n}?", "answer": f"2024-01-0{n}"} for n in (1, 2)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(file, tokenizer) is None
    loaded = datasets.load_dataset(
        "json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")
    )
    loaded.save_to_disk(str(folder))
    message = str(read(folder, tokenizer))
    for word in ("row 1: the answer in column 'answer' is a datetime, not text", "FILE.jsonl"):
        assert word in message


# -- by chance
# --------------------------------------------------------------------------------------------------

VALUES: list[Any] = [
    None, True, 0, -1.5, 10**30, float("nan"), float("inf"), "", " ", "\0", "é", "\ud800", "#### 1",
    "####", "<bos>",
    [], ["1"], [[]], {}, {"a": 1}, {"a": [{}]}, "x" * 3000, "\u2028", "{question}", "{{",
    "\\boxed{", "\U0001f600",
]  # fmt: skip


def spoilt(data: bytes, rng: random.Random) -> bytes:
    """A file's bytes cut, or with others among them."""
    if rng.random() < 0.3:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(changed))
        changed[at : at + rng.randrange(3)] = bytes(
            rng.choices(b'{}[]",:\n\r\t\\\0\xff\xd8u9', k=rng.randrange(3))
        )
    return bytes(changed)


def spoilt_rows(rng: random.Random) -> list[dict[str, Any]]:
    """The rows with values and names replaced, and some left out."""
    rows = [dict(row) for row in ROWS]
    for _ in range(rng.randrange(1, 4)):
        row = rng.choice(rows)
        key = rng.choice(["question", "answer", "response", "id", "level"])
        if rng.random() < 0.3:
            row.pop(key, None)
        else:
            row[key] = rng.choice(VALUES)
    return rows


def some_file(kind: str, rng: random.Random) -> bytes:
    """A file of `kind` that was spoilt on the way."""
    if kind == ".parquet":
        texts = [{key: row.get(key) for key in ("question", "answer", "response")} for row in ROWS]
        return spoilt(parquet(*texts), rng)
    rows = spoilt_rows(rng) if rng.random() < 0.6 else ROWS
    text = json.dumps(rows) if kind == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    return text.encode() if rows is not ROWS else spoilt(text.encode(), rng)


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet"])
def test_no_file_ends_in_a_traceback(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rng, refused, path = random.Random(kind), 0, tmp_path / f"data{kind}"
    for turn in range(INPUTS):
        path.write_bytes(some_file(kind, rng))
        message = read(path, tokenizer, sft=turn % 2 == 0)
        refused += message is not None
        assert message is None or str(path) in message, message
    assert refused >= INPUTS // 3


def test_no_saved_folder_ends_in_a_traceback(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rng, whole, folder = random.Random(0), tmp_path / "whole", tmp_path / "folder"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(whole))
    for _ in range(INPUTS // 4):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        file = rng.choice(sorted(folder.glob("*.json")))
        file.write_bytes(spoilt(file.read_bytes(), rng))
        message = read(folder, tokenizer)
        assert message is None or str(folder) in message, message
