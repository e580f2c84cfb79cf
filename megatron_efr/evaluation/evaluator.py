"""Asks an engine the held-out problems, grades its answers and gives their record."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_efr import scripts
from megatron_efr.config import (
    ConfigError,
    EvaluationConfig,
    GradingConfig,
    PromptConfig,
    ThinkingConfig,
)
from megatron_efr.data.chat import tells_date
from megatron_efr.data.datasets import dataset_name
from megatron_efr.data.lengths import check_prompts
from megatron_efr.data.thinking import thinking_marks
from megatron_efr.evaluation.judged import judge
from megatron_efr.evaluation.problems import judgings_of, load_prompts, say_overlong
from megatron_efr.evaluation.records import Record, summarise
from megatron_efr.evaluation.responses import thinking_tokens
from megatron_efr.grading import Grader
from megatron_efr.observe.progress import show_progress
from megatron_efr.rollout.checks import check_script, longest
from megatron_efr.rollout.codec import TokenizerCodec
from megatron_efr.rollout.engine import Engine
from megatron_efr.rollout.journal import Journal
from megatron_efr.rollout.ledger import request_seed
from megatron_efr.types import Graded, Marks, Request, Sampling


class Evaluator:
    """Held-out problems and how they are sampled; gives an engine's evaluation record."""

    def __init__(
        self,
        config: EvaluationConfig,
        prompt: PromptConfig,
        grading: GradingConfig,
        tokenizer: PreTrainedTokenizerBase,
        stops: tuple[int, ...],
        positions: int,
        seed: int,
        marks: Marks | None = None,
    ) -> None:
        # the section's own faults, before a tokenizer is asked
        if not config.datasets:
            raise ConfigError(
                "evaluation.datasets: empty, and an evaluation needs at least one data set of "
                "problems"
            )
        names = {dataset_name(dataset) for dataset in config.datasets}
        if unknown := sorted(config.samples_by_dataset.keys() - names):
            raise ConfigError(
                f"evaluation.samples_by_dataset.{unknown[0]}: no such data set; there are "
                f"{', '.join(sorted(names))}"
            )
        # sampling, judging and the script of each response
        temperature, top_p = config.sampling
        self.sampling = Sampling(temperature, top_p, config.max_new_tokens, stops)
        self.judgings = judgings_of(grading, config.datasets)
        script = scripts.build(config.script.name, config.script.options, "evaluation.script")
        self.script = script.within(config.max_new_tokens)
        self.script.check(config.max_new_tokens, "evaluation.script")
        # the length of a thought, for models that mark its end
        codec = TokenizerCodec(tokenizer)
        self._closes = (
            marks.closes if marks and marks != thinking_marks(ThinkingConfig(), tokenizer) else None
        )
        self._thinking = (
            partial(thinking_tokens, closes=marks.closes, codec=codec) if marks else None
        )
        check_script(self.script, codec, "evaluation.script")
        # the problems as prompts, of lengths that the model can take
        rendered = load_prompts(config.datasets, tokenizer, prompt, grading, self.script.behind)
        limit = longest(self.script, config.max_new_tokens, codec)
        written = " and what evaluation.script adds" if limit > config.max_new_tokens else ""
        check_prompts(rendered.prompts, limit, positions, f"evaluation.max_new_tokens{written}")
        say_overlong(rendered)
        # the protocol names the date only if the template tells it to the model
        self._asking = prompt.model_dump(
            mode="json", exclude=set() if tells_date(tokenizer) else {"date"}
        )
        self._left_out = Counter(problem.dataset for problem in rendered.left_out)
        self.prompts = rendered.prompts
        self._seed = seed
        # one request for each problem, its seed a function of the run's and its place
        samples = [
            config.samples_by_dataset.get(p.meta["dataset"], config.samples) for p in self.prompts
        ]
        self._requests = [
            Request(prompt, request_seed(seed, -1 - i), (self.script,) * count)
            for i, (prompt, count) in enumerate(zip(self.prompts, samples, strict=True))
        ]

    def asked(self) -> dict[str, Any]:
        """Questions and sampling, by name: equal if two evaluations of one model may share their
        answers.
        """
        problems = [
            [r.prompt.id, r.prompt.tokens, r.prompt.gold, dict(r.prompt.meta), r.samples]
            for r in self._requests
        ]
        return {
            "seed": self._seed,
            **asdict(self.sampling),
            "stop_ids": list(self.sampling.stop_ids),
            **({} if self.script == scripts.Plain() else {"script": scripts.encode(self.script)}),
            "problems": hashlib.sha256(json.dumps(problems).encode()).hexdigest(),
        }

    def judged(self) -> dict[str, Any]:
        """Judging of answers by data set, and a configured end of the thought: equal if the
        same answers make the same record."""
        judgings = {
            name: self.judgings.of_dataset(name)
            for name in {p.meta["dataset"] for p in self.prompts}
        }
        judged = {
            f"grading of {name}": json.loads(json.dumps(asdict(judgings[name])))
            for name in sorted(judgings)
        }
        return judged if self._closes is None else judged | {"model.thinking.closes": self._closes}

    def protocol(self) -> dict[str, Any]:
        """Problems, sampling and verifiers, by name: equal if two evaluations, of any models, can
        be compared.
        """
        problems = [[r.prompt.id, r.prompt.gold, r.prompt.meta["question"]] for r in self._requests]
        return {
            "problems": dict(Counter(r.prompt.meta["dataset"] for r in self._requests)),
            "questions": hashlib.sha256(json.dumps(problems).encode()).hexdigest(),
            "left_out": dict(self._left_out),
            "samples": {r.prompt.meta["dataset"]: r.samples for r in self._requests},
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "max_new_tokens": self.sampling.max_new_tokens,
            "script": scripts.encode(self.script),
            "prompt": self._asking,
            **self.judged(),
        }

    def run(
        self,
        engine: Engine,
        grader: Grader,
        name: str,
        journal: Journal | None = None,
        after_each: Callable[[], None] = lambda: None,
        keep: Callable[[Sequence[Graded]], None] = lambda graded: None,
    ) -> Record:
        """Answer and grade every problem; those that `journal` holds are taken from there, and the
        others added.

        `keep` is given the judged answers, in the order of the problems.
        """
        # those that an earlier process answered are in the journal
        before = journal.read().groups if journal else []
        finished = {group.seed: group for group in before}
        if finished:
            print(
                f"{name}: {len(finished)} of {len(self._requests)} problems were answered before",
                flush=True,
            )
        # ask for the others; each is journalled as soon as it is whole
        left = [request for request in self._requests if request.seed not in finished]
        with closing(engine.generate(left, self.sampling)) as answers:
            for group in show_progress(answers, name, len(self._requests), len(finished)):
                if journal:
                    journal.append(group)
                finished[group.seed] = group
                after_each()
        # judge all of them, in the problems' order
        groups = [finished[request.seed] for request in self._requests]
        judged = judge(groups, self.script, grader, self.judgings)
        keep(judged.graded)
        return summarise(
            judged.graded,
            name,
            answers=judged.answers,
            early=judged.early,
            subthoughts=judged.subthoughts,
            thinking=self._thinking,
            protocol=self.protocol(),
            left_out=self._left_out,
        )
