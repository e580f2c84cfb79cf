"""Problems to train on, and how they are put to the model."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from megatron_efr.config.grading import JudgingConfig
from megatron_efr.config.section import Section


class DatasetConfig(Section):
    """A source of questions, and how its rows are read."""

    path: str = Field(
        description="a .jsonl / .json / .parquet file, a folder saved by datasets, or a hub name"
    )
    format: Literal["auto", "gsm8k", "math", "columns"] = Field(
        default="auto",
        description=(
            "auto: gsm8k if the answer holds '####', else question/answer columns found by name"
        ),
    )
    split: str = Field(default="train", description="split of a hub data set")
    question: str | None = Field(
        default=None, description="column of the question; found by name when left out"
    )
    answer: str | None = Field(
        default=None, description="column of the gold answer; found by name when left out"
    )
    difficulty: str | None = Field(
        default=None, description="column to report tokens and accuracy by"
    )
    name: str | None = Field(
        default=None, description="name in reports; the file's stem when left out"
    )
    limit: PositiveInt | None = Field(default=None, description="first rows only")
    grading: JudgingConfig | None = Field(
        default=None,
        description=(
            "how this data set's answers are judged; as in the section `grading` when left out"
        ),
    )

    @property
    def known_as(self) -> str:
        """The name in reports: as configured, else the file's stem or the last part of the hub
        name.
        """
        last = Path(self.path).name
        return self.name or (
            Path(last).stem if last.endswith((".jsonl", ".json", ".parquet")) else last
        )


def check_names(datasets: Sequence[DatasetConfig], where: str) -> None:
    """ValueError if two data sets have one name: their problems could not be told apart."""
    paths: dict[str, str] = {}
    for i, dataset in enumerate(datasets):
        if dataset.known_as in paths:
            raise ValueError(
                f"{where}.{i}: {dataset.path} and {paths[dataset.known_as]} are both called "
                f"{dataset.known_as!r}; give one of them another `name`"
            )
        paths[dataset.known_as] = dataset.path


class PromptConfig(Section):
    """Turns a question into token ids."""

    template: str = Field(
        default=(
            "Please reason step by step, and put your final answer within \\boxed{{}}. Question: "
            "{question}"
        ),
        description="the user turn; a str.format template with {question}",
    )
    system: str | None = Field(default=None, description="the system turn; none when left out")
    prefill: str = Field(
        default="template",
        description=(
            "what follows the assistant tag: 'template' (what the chat template writes), 'none' "
            "(refuse a template that adds more), or a text to append"
        ),
    )
    max_tokens: PositiveInt = Field(
        default=512, description="the longest prompt, its template included"
    )
    overlong: Literal["skip", "error"] = Field(
        default="skip", description="a longer prompt is left out and counted, or refused"
    )
    date: str | None = Field(
        default=None,
        pattern=r"^\d{4}-\d\d-\d\d$",
        description=(
            "date, as YYYY-MM-DD, for a chat template that asks for one; by default the day that "
            "the run began, after a resume too"
        ),
    )

    @field_validator("date", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        # as YAML reads it without quotes
        return value.isoformat() if isinstance(value, date) else value

    @field_validator("template")
    @classmethod
    def _asks_the_question(cls, template: str) -> str:
        try:
            fields = [
                (name, spec) for _, name, spec, _ in Formatter().parse(template) if name is not None
            ]
        except ValueError as error:
            raise ValueError(
                f"no str.format template: {error}; literal braces are doubled"
            ) from error
        for name, spec in fields:
            if name != "question" or spec:
                field = f"{name}:{spec}" if spec else name
                raise ValueError(
                    f"{{{field}}} is no field: {{question}} is the only one; literal braces are "
                    "doubled"
                )
        if not fields:
            raise ValueError("leaves the question out; it needs {question}")
        return template


class DataConfig(Section):
    """The stream of training prompts."""

    datasets: list[DatasetConfig] = Field(
        min_length=1, description="their rows make one stream of prompts"
    )
    prompt: PromptConfig = Field(default_factory=PromptConfig)
    shuffle: bool = Field(
        default=True,
        description="a new order in every pass, drawn from the seed; else the files' order",
    )
    reference: str | None = Field(
        default=None,
        description=(
            "the starting model's responses, for methods that want them: another run's "
            "reference.jsonl; the run samples them itself when left out"
        ),
    )

    @model_validator(mode="after")
    def _names_differ(self) -> DataConfig:
        check_names(self.datasets, "data.datasets")
        return self


class SftDataConfig(Section):
    """Rows of question and response text, `{"question", "response"}` by default; or a run's own
    judged answers.
    """

    path: str = Field(
        description=(
            "a .jsonl / .json / .parquet file, a folder saved by datasets, or a hub name; or "
            "answers: a .jsonl.zst file of rollouts/ or eval/, or a folder of them"
        )
    )
    pick: Literal["shortest", "right"] = Field(
        default="shortest",
        description="of answers: the shortest right one of each prompt, or every right one",
    )
    question: str = Field(default="question", description="column of the question")
    response: str | list[str] = Field(
        default="response",
        min_length=1,
        description=(
            "column of the response, or several: each one that a row has is learnt from by itself"
        ),
    )
    limit: PositiveInt | None = Field(default=None, description="first rows only")


class PairsDataConfig(Section):
    """Pairs of a run's own judged answers: to each prompt its shortest right answer, and its
    longest.
    """

    path: str = Field(description="a .jsonl.zst file of rollouts/ or eval/, or a folder of them")
    limit: PositiveInt | None = Field(default=None, description="first pairs only")
