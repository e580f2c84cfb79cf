"""Problems as prompts: loaded, checked against the verifiers that will judge their answers,
rendered and shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase

from megatron_efr.config import DatasetConfig, GradingConfig, PromptConfig
from megatron_efr.data.datasets import dataset_name, load_problems
from megatron_efr.data.prompts import Rendered, render_all
from megatron_efr.grading.gold_checks import check_for
from megatron_efr.grading.judging import Judgings
from megatron_efr.types import Prompt

SHOWN_PROMPTS = 3


def load_prompts(
    datasets: Sequence[DatasetConfig],
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    grading: GradingConfig | None = None,
    behind: str = "",
) -> Rendered:
    """Every problem of the data sets as a prompt, with the text `behind` its question. Gold answers
    that a data set's own verifiers cannot judge against, and verifiers that cannot be loaded, stop
    here.
    """
    grading = grading or GradingConfig()
    judgings = judgings_of(grading, datasets)
    problems = [
        problem
        for dataset in datasets
        for problem in load_problems(
            dataset, partial(check_for, judgings.of_dataset(dataset_name(dataset)), grading)
        )
    ]
    return render_all(problems, tokenizer, prompt, behind)


def judgings_of(grading: GradingConfig, datasets: Sequence[DatasetConfig]) -> Judgings:
    """Judging of each data set's answers."""
    return Judgings.of(grading, [(dataset_name(dataset), dataset.grading) for dataset in datasets])


def show(rendered: Rendered) -> None:
    """Print the first prompts as the model will read them, and how many were too long."""
    for prompt in rendered.prompts[:SHOWN_PROMPTS]:
        print(_framed(prompt), flush=True)
    say_overlong(rendered)


def say_overlong(rendered: Rendered) -> None:
    """Print how many prompts were left out, if any were."""
    if rendered.overlong:
        print(
            f"{rendered.overlong} prompts are longer than prompt.max_tokens and were left out",
            flush=True,
        )


def _framed(prompt: Prompt) -> str:
    return (
        f"prompt {prompt.id} ({len(prompt.tokens)} tokens, answer {prompt.gold}): {prompt.text!r}"
    )
