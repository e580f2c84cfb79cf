"""Data sets become problems, and rows that cannot are named with file and line."""

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatron_efr.config import DatasetConfig
from megatron_efr.data.datasets import load_problems
from megatron_efr.data.readers import DatasetError, read_rows

pytestmark = pytest.mark.alike
HERE = Path(__file__).parents[2] / "data"


def lines(path: Path, *rows: Any) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return str(path)


def test_gsm8k_answer_stands_after_the_mark() -> None:
    problems = load_problems(DatasetConfig(path=str(HERE / "gsm8k_train.jsonl")))
    assert len(problems) == 30
    first = problems[0]
    assert (first.id, first.gold, first.dataset, first.difficulty) == (
        "gsm8k_train/1",
        "72",
        "gsm8k_train",
        None,
    )
    assert first.where == f"{HERE}/gsm8k_train.jsonl:1"
    assert first.question.startswith("Natalia sold clips")


def test_gsm8k_commas_are_taken_out(tmp_path: Path) -> None:
    path = lines(tmp_path / "g.jsonl", {"question": "q", "answer": "so 1,000+234\n#### 1,234"})
    assert load_problems(DatasetConfig(path=path))[0].gold == "1234"


@pytest.mark.parametrize(
    ("written", "gold"),
    [
        ("(1,2)", "(1,2)"),
        ("1,2", "1,2"),
        ("(1,234)", "(1,234)"),
        ("$1,234.50", "$1234.50"),
        ("1,234,567", "1234567"),
        ("-1,080", "-1080"),
        ("1,000, 2,000", "1,000, 2,000"),
        ("[1,100]", "[1,100]"),
    ],
)
def test_gsm8k_keeps_commas_that_group_no_thousands(
    tmp_path: Path, written: str, gold: str
) -> None:
    path = lines(tmp_path / "g.jsonl", {"question": "q", "answer": f"so\n#### {written}"})
    assert load_problems(DatasetConfig(path=path))[0].gold == gold


@pytest.mark.parametrize(
    ("value", "gold"),
    [
        (0.00001, "0.00001"),
        (1e-7, "0.0000001"),
        (1e22, "10000000000000000000000"),
        (0.1, "0.1"),
        (2.0, "2.0"),
        (-1.5e-5, "-0.000015"),
        (10**30, "1" + "0" * 30),
        (0, "0"),
    ],
)
def test_numbers_keep_their_meaning_as_golds(tmp_path: Path, value: float, gold: str) -> None:
    path = lines(tmp_path / "a.jsonl", {"question": "q", "answer": value})
    assert load_problems(DatasetConfig(path=path))[0].gold == gold
    table = tmp_path / "a.parquet"
    if isinstance(value, float):
        datasets.Dataset.from_list([{"question": "q", "answer": value}]).to_parquet(str(table))
        assert load_problems(DatasetConfig(path=str(table)))[0].gold == gold


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("NaN", "is nan, which is no number"),
        ("Infinity", "is inf, which is no number"),
        ("null", "is null"),
        ("true", "is the boolean true"),
        ("[1, 2]", "is a list, not text"),
        ('"  "', "is empty"),
    ],
)
def test_values_that_are_no_gold_are_named(tmp_path: Path, value: str, said: str) -> None:
    path = lines(
        tmp_path / "a.jsonl",
        {"question": "q", "answer": "5"},
        f'{{"question": "q", "answer": {value}}}',
    )
    with pytest.raises(DatasetError, match=rf"a\.jsonl:2: the answer in column 'answer' {said}"):
        load_problems(DatasetConfig(path=path))


def test_a_json_columns_value_is_read_not_its_quotes(tmp_path: Path) -> None:
    features = datasets.Features({"question": datasets.Value("string"), "answer": datasets.Json()})
    rows = [{"question": "q", "answer": answer} for answer in ("1/2", 5, 0.00001)]
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    for place in ("a.parquet", "saved"):
        assert [p.gold for p in load_problems(DatasetConfig(path=str(tmp_path / place)))] == [
            "1/2",
            "5",
            "0.00001",
        ]


def test_math_has_levels_and_own_ids() -> None:
    first = load_problems(DatasetConfig(path=str(HERE / "math500.jsonl"), format="math"))[0]
    assert first.id == "math500/test/precalculus/807.json"
    assert (first.gold, first.difficulty) == (r"\left( 3, \frac{\pi}{2} \right)", 2)


def test_aime() -> None:
    problems = load_problems(DatasetConfig(path=str(HERE / "aime24.jsonl"), name="AIME", limit=3))
    assert [(p.id, p.gold) for p in problems] == [
        ("AIME/60", "204"),
        ("AIME/61", "113"),
        ("AIME/62", "371"),
    ]


def test_columns_as_configured(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"ask": "1+1", "reply": 2, "hard": "low"})
    config = DatasetConfig(
        path=path, format="columns", question="ask", answer="reply", difficulty="hard"
    )
    [problem] = load_problems(config)
    assert (problem.question, problem.gold, problem.difficulty) == ("1+1", "2", "low")


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("Level 3", "Level 3"),
        (3, 3),
        (0.25, 0.25),
        (True, "True"),
        (None, None),
        (float("nan"), None),
        ([1, 2], "[1, 2]"),
        ({"a": 1}, "{'a': 1}"),
    ],
)
def test_a_difficulty_of_any_type_is_a_text_or_a_number(
    tmp_path: Path, value: Any, read: Any
) -> None:
    path = lines(tmp_path / "a.jsonl", {"question": "1+1", "answer": "2", "difficulty": value})
    [problem] = load_problems(DatasetConfig(path=path))
    assert problem.difficulty == read
    assert type(problem.difficulty) is type(read)


def test_difficulties_that_json_has_no_type_for_become_text(tmp_path: Path) -> None:
    day, number = datetime.datetime(2020, 2, 29), decimal.Decimal("1.5")
    rows = {"question": ["1+1"], "answer": ["2"], "difficulty": [day], "level": [number]}
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict(rows).to_parquet(path)
    configs = [
        DatasetConfig(path=str(path), difficulty=column) for column in ("difficulty", "level")
    ]
    assert [load_problems(config)[0].difficulty for config in configs] == [
        "2020-02-29 00:00:00",
        "1.5",
    ]


def test_ids_are_stable_when_rows_are_appended(tmp_path: Path) -> None:
    rows = [
        {"id": "x", "question": "a", "answer": "1"},
        {"id": "x", "question": "b", "answer": "2"},
    ]
    path = lines(tmp_path / "a.jsonl", *rows)
    before = [p.id for p in load_problems(DatasetConfig(path=path))]
    lines(tmp_path / "a.jsonl", *rows, rows[0])
    after = [p.id for p in load_problems(DatasetConfig(path=path))]
    assert before == ["a/x", "a/x#2"]
    assert after == [*before, "a/x#3"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"question": "q", "answer": "1"}, {"question": "q"}],
            r"a\.jsonl:2: no answer: .* the row has columns question",
        ),
        ([{"question": "q", "answer": None}], r"a\.jsonl:1: the answer in column 'answer' is null"),
        (
            [{"question": "q", "answer": ["1"]}],
            r"a\.jsonl:1: the answer in column 'answer' is a list, not text",
        ),
        (
            [{"question": " ", "answer": "1"}],
            r"a\.jsonl:1: the question in column 'question' is empty",
        ),
        ([{"answer": "1"}], r"a\.jsonl:1: no question"),
        (["", "{oops"], r"a\.jsonl:2: not valid JSON"),
        (["[1]"], r"a\.jsonl:1: expected an object"),
        (
            [{"question": "q", "answer": "so\n####"}],
            r"a\.jsonl:1: a gsm8k answer ends with '#### <answer>'",
        ),
        ([], "holds no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        load_problems(DatasetConfig(path=lines(tmp_path / "a.jsonl", *rows)))


def test_configured_column_must_exist(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"question": "q", "answer": "1"})
    with pytest.raises(
        DatasetError, match=r"a\.jsonl:1: no column 'level' for the difficulty; the row has columns"
    ):
        load_problems(DatasetConfig(path=path, difficulty="level"))


def test_gsm8k_format_demands_the_mark(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.jsonl",
        {"question": "q", "answer": "#### 1"},
        {"question": "q", "answer": "12"},
    )
    with pytest.raises(DatasetError, match=r"a\.jsonl:2: a gsm8k answer"):
        load_problems(DatasetConfig(path=path, format="gsm8k"))


def test_json_array_counts_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(
        '[\n  {"question": "a\\nb",\n   "answer": "1"},\n  {"question": "c", "answer": "2"}\n]\n'
    )
    assert [row.where for row in read_rows(str(path))] == [f"{path}:2", f"{path}:4"]
    path.write_text('[\n  {"question": "a"}\n  {"question": "c"}\n]\n')
    with pytest.raises(DatasetError, match=r"a\.json:2: not valid JSON: expected ','"):
        read_rows(str(path))
    path.write_text('[\n  {"question": "a"},\n')
    with pytest.raises(DatasetError, match=r"a\.json:3: not valid JSON"):
        read_rows(str(path))


def test_tables(tmp_path: Path) -> None:
    """Parquet, a saved data set and a saved set of splits give the same problems."""
    table = datasets.Dataset.from_list(
        [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}]
    )
    table.to_parquet(str(tmp_path / "t.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "splits"))
    for name, split in (("t.parquet", "train"), ("saved", "train"), ("splits", "test")):
        problems = load_problems(DatasetConfig(path=str(tmp_path / name), split=split, name="t"))
        assert [(p.id, p.question, p.gold) for p in problems] == [
            ("t/1", "a", "1"),
            ("t/2", "b", "2"),
        ]
        assert problems[1].where == f"{tmp_path / name}:row 2"
    with pytest.raises(DatasetError, match="has no split 'train'; it has test"):
        load_problems(DatasetConfig(path=str(tmp_path / "splits")))
    with pytest.raises(DatasetError, match="not one that datasets' save_to_disk wrote"):
        load_problems(DatasetConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    "path", ["missing.jsonl", "./missing", "/no/such/place", "../missing", "tests/missing"]
)
def test_missing_file_is_not_looked_up_on_the_hub(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HERE.parents[1])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(DatasetError, match="no such file or folder"):
        load_problems(DatasetConfig(path=path))


def test_gold_check_is_handed_place_and_gold() -> None:
    seen: list[tuple[str, str]] = []
    load_problems(DatasetConfig(path=str(HERE / "aime24.jsonl"), limit=2), seen.extend)
    assert seen == [(f"{HERE}/aime24.jsonl:1", "204"), (f"{HERE}/aime24.jsonl:2", "113")]
