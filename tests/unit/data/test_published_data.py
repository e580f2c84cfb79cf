"""Data sets as they are published: the examples read files of their columns, here a few rows of our
own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from megatron_efr.config import PromptConfig, SftConfig, SftDataConfig, TrainConfig
from megatron_efr.config.file import load
from megatron_efr.data.byte_model import BYTE_MODEL, byte_tokenizer
from megatron_efr.data.datasets import load_problems
from megatron_efr.data.model_folder import write_model_folder
from megatron_efr.data.prompts import PromptError, load_tokenizer
from megatron_efr.data.readers import DatasetError
from megatron_efr.data.sft import load_sft
from megatron_efr.grading import check_golds

EXAMPLES = Path(__file__).parents[3] / "examples"
SOLUTIONS = ("r1_solution_1", "r1_solution_2", "r1_solution_3")
DEEPMATH = pa.schema(
    [
        *[(name, pa.string()) for name in ("question", "final_answer")],
        ("difficulty", pa.float64()),
        *[(name, pa.string()) for name in ("topic", *SOLUTIONS)],
    ]
)
"""The columns of zwhe99/DeepMath-103K, in their order, and their types."""
STILL3 = pa.schema([("question", pa.string()), ("answer", pa.string())])
"""Those of RUC-AIBOX/STILL-3-Preview-RL-Data."""

PROBLEMS: list[tuple[str, str, float]] = [
    ("Find \\(\\lim_{x \\to 0} \\frac{\\sin 3x}{x}\\).", "3", 4.5),
    ("Is every subgroup of an abelian group normal?", "Yes", 3.0),
    ("Evaluate \\(\\int_0^1 x^2 \\, dx\\).", "\\dfrac{1}{3}", 2.0),
    ("To what does \\(\\sum 1/n\\) diverge?", "\\infty", 5.5),
]


@pytest.fixture
def deepmath(tmp_path: Path) -> Path:
    """Four rows; the second lacks its third solution, and the last its first."""
    rows: list[dict[str, Any]] = [
        {
            "question": question,
            "final_answer": gold,
            "difficulty": hard,
            "topic": "Mathematics -> Calculus",
        }
        | {
            name: f"Think {number}.\n</think>\n\n\\boxed{{{gold}}}"
            for number, name in enumerate(SOLUTIONS, start=1)
        }
        for question, gold, hard in PROBLEMS
    ]
    rows[1]["r1_solution_3"], rows[3]["r1_solution_1"] = None, "  "
    path = tmp_path / "train-00000-of-00010.parquet"
    pq.write_table(pa.Table.from_pylist(rows, DEEPMATH), path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    place = tmp_path_factory.mktemp("byte_model")
    write_model_folder(place, byte_tokenizer(), BYTE_MODEL)
    return load_tokenizer(place)


def test_deepmath_has_problems_with_their_difficulty(deepmath: Path) -> None:
    config = load(
        TrainConfig, EXAMPLES / "deepmath_1.5b.yaml", [f"data.datasets.0.path={deepmath}"]
    )
    (dataset,) = config.data.datasets
    problems = load_problems(dataset, check_golds)
    assert [(each.question, each.gold, each.difficulty) for each in problems] == PROBLEMS
    assert [each.id for each in problems] == [f"deepmath/{number}" for number in range(1, 5)]
    assert (config.rollout.max_new_tokens, config.method.options["cache"]) == (24576, 4096)
    plain = load_problems(dataset.model_copy(update={"answer": None, "difficulty": None}))
    assert plain == problems, "the columns are found by their names as well"


def test_still3_has_problems_that_are_asked_for_once_each(tmp_path: Path) -> None:
    path = tmp_path / "train-00000-of-00001.parquet"
    pq.write_table(
        pa.Table.from_pylist([{"question": q, "answer": a} for q, a, _ in PROBLEMS], STILL3), path
    )
    config = load(TrainConfig, EXAMPLES / "still3_1.5b.yaml", [f"data.datasets.0.path={path}"])
    problems = load_problems(config.data.datasets[0], check_golds)
    assert [(each.question, each.gold) for each in problems] == [(q, a) for q, a, _ in PROBLEMS]
    assert (config.train.updates, config.method.options["alpha"]) == (1, 0), (
        "on-policy, and no price on length"
    )


def test_every_solution_of_a_row_is_learnt_from(
    deepmath: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = load(SftConfig, EXAMPLES / "deepmath_sft_7b.yaml", [f"data.path={deepmath}"])
    prompt = config.prompt.model_copy(update={"template": "{question}"})
    made = load_sft(config.data, tokenizer, prompt)
    said = [
        (
            tokenizer.decode(sample.tokens[: sample.prompt_length]),
            tokenizer.decode(sample.tokens[sample.prompt_length : -1]),
        )
        for sample in made.samples
    ]
    kept = {0: (1, 2, 3), 1: (1, 2), 2: (1, 2, 3), 3: (2, 3)}
    assert [response for _, response in said] == [
        f"Think {number}.\n</think>\n\n\\boxed{{{PROBLEMS[row][1]}}}"
        for row in kept
        for number in kept[row]
    ]
    questions = [PROBLEMS[row][0] for row in kept for _ in kept[row]]
    assert all(question in text for question, (text, _) in zip(questions, said, strict=True))
    assert made.overlong == 0
    one = load_sft(config.data.model_copy(update={"response": "r1_solution_2"}), tokenizer, prompt)
    assert [sample.tokens.tolist() for sample in one.samples] == [
        made.samples[index].tokens.tolist() for index in (1, 4, 6, 8)
    ]


def test_rows_without_a_solution_and_prompts_that_are_too_long_are_told(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "rows.jsonl"
    data = SftDataConfig(path=str(path), response=["a", "b"])
    path.write_text(
        '{"question": "1+1", "a": "2", "b": null}\n{"question": "1+2", "a": "", "b": null}\n'
    )
    with pytest.raises(
        DatasetError, match=r"rows\.jsonl:2: no text in any of the columns a, b; a row needs one"
    ):
        load_sft(data, tokenizer, PromptConfig(template="{question}"))
    path.write_text('{"question": "1+1", "a": "2", "c": "2"}\n')
    with pytest.raises(
        DatasetError,
        match=r"rows\.jsonl:1: no text in column 'b'; the row has columns question, a, c",
    ):
        load_sft(data, tokenizer, PromptConfig(template="{question}"))
    path.write_text(
        f'{{"question": "1+1", "a": "2", "b": "3"}}\n{{"question": "{"1" * 99}", "a": "x", "b": "y"}}\n'
    )
    made = load_sft(data, tokenizer, PromptConfig(template="{question}", max_tokens=20))
    assert (len(made.samples), made.overlong) == (2, 1), "a row counts once, whatever its responses"
    with pytest.raises(PromptError, match="all 2 prompts are longer"):
        load_sft(data, tokenizer, PromptConfig(template="{question}", max_tokens=1))
