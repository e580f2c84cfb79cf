"""What rank 0 alone owns in a run: tokenizer, prompts, engine, ledger, graders, held-out problems."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_efr import scripts
from megatron_efr.algorithms import Algorithm
from megatron_efr.config import (
    ConfigError,
    DatasetConfig,
    EvaluationConfig,
    GradingConfig,
    PromptConfig,
    TrainConfig,
)
from megatron_efr.data.datasets import dataset_name, load_problems
from megatron_efr.data.lengths import check_prompts
from megatron_efr.data.prompts import Rendered, load_tokenizer, render_all
from megatron_efr.data.stop_tokens import stop_ids
from megatron_efr.data.stream import PromptStream
from megatron_efr.grading import Grader
from megatron_efr.grading.equality import equal_answers
from megatron_efr.grading.gold_checks import check_for
from megatron_efr.grading.groups import grade_groups
from megatron_efr.grading.judging import Judgings
from megatron_efr.methods import Knowledge, Known, Method, reward
from megatron_efr.observe.progress import followed
from megatron_efr.report.records import Record, summarise
from megatron_efr.rollout.build import build_engine
from megatron_efr.rollout.codec import TokenizerCodec
from megatron_efr.rollout.engine import Engine
from megatron_efr.rollout.judging import Accept
from megatron_efr.rollout.ledger import Ledger, request_seed
from megatron_efr.rollout.production import Production
from megatron_efr.rollout.requests import check_script, longest
from megatron_efr.rollout.servers.run_servers import Servers
from megatron_efr.run.asking import Asking
from megatron_efr.run.folder import Journal, RunFolder
from megatron_efr.types import Group, Prompt, Request, Rewarded, Sampling
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import initial_weights

SHOWN_PROMPTS = 3


class Environment:
    """The prompts that the policy is asked, the engine that answers for it, and the graders of its answers.

    The first and the last are there when it is made, and checked; the engine when `connect` has taken it into use.
    """

    engine: Engine
    production: Production
    ledger: Ledger

    def __init__(self, config: TrainConfig, method: Method, algorithm: Algorithm) -> None:
        tokenizer = load_tokenizer(config.model.path)
        # refuses a folder whose weights are missing or are others than config.json's, before anything is built
        architecture = Architecture.from_folder(config.model.path)
        initial_weights(config.model, architecture, config.seed)
        rendered = load_prompts(config.data.datasets, tokenizer, config.data.prompt, config.grading)
        check_prompts(
            rendered.prompts, config.rollout.max_new_tokens, architecture.max_positions, "rollout.max_new_tokens"
        )
        stops = stop_ids(config.model.path, tokenizer)
        self.stream = PromptStream(rendered.prompts, config.seed, config.data.shuffle)
        self._evaluate_every = config.evaluation.every or 0
        self.evaluator = (
            evaluator_of(config, tokenizer, stops, architecture.max_positions) if self._evaluate_every else None
        )
        self._config, self._codec = config, TokenizerCodec(tokenizer)
        self._method, self._algorithm = method, algorithm
        rollout = config.rollout
        self.knowledge = Knowledge(method, rollout.max_new_tokens)
        self._asking = Asking(config, method, tokenizer, lambda: self.knowledge.latest)
        self._asking.check(rendered.prompts, self._codec, architecture.max_positions)
        shown = [self._asking.example(prompt) for prompt in rendered.prompts[:SHOWN_PROMPTS]]
        show(Rendered(shown, rendered.left_out))
        self._sampling = Sampling(rollout.temperature, rollout.top_p, rollout.max_new_tokens, stops)
        self._judgings = judgings_of(config.grading, config.data.datasets)
        held_out = self.evaluator.judgings.verifiers if self.evaluator else []
        self.grader = Grader.of(config.grading, [*self._judgings.verifiers, *held_out])

    def connect(self, servers: Servers, resources: ExitStack) -> None:
        """Take the engine into use, over `servers` or embedded; `resources` end it, and the thread of rollouts."""
        config = self._config
        logs = config.folder / "engines"
        self.engine = build_engine(config.model, config.rollout, servers, logs, self._codec, resources)
        self.production = Production(self.engine, self._sampling)
        self.ledger = Ledger(
            self.stream,
            self.judging,
            self.production,
            config.rollout,
            seed=config.seed,
            last=config.train.iterations,
            ask=self._asking.request,
        )
        resources.callback(self.ledger.close)

    def judging(self, step: int) -> Accept:
        """How the groups of iteration `step`, which begins, are judged: by what is known now."""
        return partial(self._accept, self.knowledge.begin(step))

    def _accept(self, known: Known, groups: Sequence[Group]) -> list[Rewarded | None]:
        """Grade and reward finished groups; None in the place of one that the algorithm does not keep."""
        graded = grade_groups(self.grader, groups, self._judgings)
        rewarded = [reward(self._method, group, known) for group in graded]
        return [group if self._algorithm.keeps(group.rewards) else None for group in rewarded]

    def evaluate(self, step: int, folder: RunFolder) -> dict[str, float]:
        """Ask and grade the held-out problems with the weights being served, where step `step` is one to do so.

        The record goes to `folder`.
        """
        if self.evaluator is None or step % self._evaluate_every:
            return {}
        with self.production.held():
            record = self.evaluator.run(self.engine, self.grader, f"step_{step:06d}")
        folder.write_evaluation(record["name"], record)
        return {"eval/accuracy": record["accuracy"], "eval/tokens": record["tokens"]}

    def engine_figures(self) -> dict[str, float]:
        """How many servers serve, and since the last call: lost, taken in again, responses asked for again.

        `refused`: the groups that were replaced in the last iteration since the algorithm did not keep them.
        """
        health = self.engine.health()
        found = {f"engine/{name}": health[name] for name in ("serving", "lost", "back", "resent") if name in health}
        return found | {"engine/refused": float(self.ledger.refused)}

    def close(self) -> None:
        """End the grading processes."""
        self.grader.close()


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
    ) -> None:
        if not config.datasets:
            raise ConfigError("evaluation.datasets: empty, and an evaluation needs at least one data set of problems")
        names = {dataset_name(dataset) for dataset in config.datasets}
        if unknown := sorted(config.samples_by_dataset.keys() - names):
            raise ConfigError(
                f"evaluation.samples_by_dataset.{unknown[0]}: no such data set; there are {', '.join(sorted(names))}"
            )
        temperature, top_p = config.sampling
        self.sampling = Sampling(temperature, top_p, config.max_new_tokens, stops)
        self.judgings = judgings_of(grading, config.datasets)
        self.script = scripts.build(config.script.name, config.script.options, "evaluation.script")
        self.script.check(config.max_new_tokens, "evaluation.script")
        codec = TokenizerCodec(tokenizer)
        check_script(self.script, codec, "evaluation.script")
        rendered = load_prompts(config.datasets, tokenizer, prompt, grading)
        limit = longest(self.script, config.max_new_tokens, codec)
        written = " and what evaluation.script adds" if limit > config.max_new_tokens else ""
        check_prompts(rendered.prompts, limit, positions, f"evaluation.max_new_tokens{written}")
        say_overlong(rendered)
        self._left_out = Counter(problem.dataset for problem in rendered.left_out)
        self.prompts = rendered.prompts
        self._seed = seed
        samples = [config.samples_by_dataset.get(p.meta["dataset"], config.samples) for p in self.prompts]
        self._requests = [
            Request(prompt, request_seed(seed, -1 - i), (self.script,) * count)
            for i, (prompt, count) in enumerate(zip(self.prompts, samples, strict=True))
        ]

    def asked(self) -> dict[str, Any]:
        """What is asked, and how: equal where two evaluations of one model may share their answers."""
        problems = [
            [r.prompt.id, r.prompt.tokens, r.prompt.gold, dict(r.prompt.meta), r.samples] for r in self._requests
        ]
        return {
            "seed": self._seed,
            **asdict(self.sampling),
            "stop_ids": list(self.sampling.stop_ids),
            **({} if self.script == scripts.Plain() else {"script": scripts.encode(self.script)}),
            "problems": hashlib.sha256(json.dumps(problems).encode()).hexdigest(),
        }

    def judged(self) -> dict[str, Any]:
        """How answers are judged, by data set: equal where the same answers make the same record."""
        judgings = {name: self.judgings.of_dataset(name) for name in {p.meta["dataset"] for p in self.prompts}}
        return {f"grading of {name}": json.loads(json.dumps(asdict(judgings[name]))) for name in sorted(judgings)}

    def run(
        self,
        engine: Engine,
        grader: Grader,
        name: str,
        journal: Journal | None = None,
        after_each: Callable[[], None] = lambda: None,
    ) -> Record:
        """Answer and grade every problem; those that `journal` holds are taken from there, and the others added."""
        finished = {group.seed: group for group in (journal.read().groups if journal else [])}
        if finished:
            print(f"{name}: {len(finished)} of {len(self._requests)} problems were answered before", flush=True)
        left = [request for request in self._requests if request.seed not in finished]
        with closing(engine.generate(left, self.sampling)) as answers:
            for group in followed(answers, name, len(self._requests), len(finished)):
                if journal:
                    journal.append(group)
                finished[group.seed] = group
                after_each()
        groups = [finished[request.seed] for request in self._requests]
        graded = grade_groups(grader, groups, self.judgings)
        answers = equal_answers(grader, graded, self.judgings)
        record = summarise(graded, name, answers=answers, left_out=self._left_out)
        return record | {"script": scripts.encode(self.script)}


def evaluator_of(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, stops: tuple[int, ...], positions: int
) -> Evaluator:
    """The held-out problems of a training run."""
    return Evaluator(config.evaluation, config.data.prompt, config.grading, tokenizer, stops, positions, config.seed)


def check_evaluation(config: TrainConfig) -> None:
    """Load and check the held-out problems of a run that itself does not ask them."""
    tokenizer = load_tokenizer(config.model.path)
    positions = Architecture.from_folder(config.model.path).max_positions
    evaluator_of(config, tokenizer, stop_ids(config.model.path, tokenizer), positions)


def date_prompts(prompt: PromptConfig, folder: RunFolder) -> None:
    """Let prompts that tell a date tell the day on which work in `folder` began, where `prompt` names none."""
    prompt.date = prompt.date or folder.began()


def load_prompts(
    datasets: Sequence[DatasetConfig],
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    grading: GradingConfig | None = None,
) -> Rendered:
    """Every problem of the data sets as a prompt. Gold answers that a data set's own verifiers cannot judge against,
    and verifiers that cannot be loaded, stop here."""
    grading = grading or GradingConfig()
    judgings = judgings_of(grading, datasets)
    problems = [
        problem
        for dataset in datasets
        for problem in load_problems(dataset, partial(check_for, judgings.of_dataset(dataset_name(dataset)), grading))
    ]
    return render_all(problems, tokenizer, prompt)


def judgings_of(grading: GradingConfig, datasets: Sequence[DatasetConfig]) -> Judgings:
    """How each data set's answers are judged."""
    return Judgings.of(grading, [(dataset_name(dataset), dataset.grading) for dataset in datasets])


def show(rendered: Rendered) -> None:
    """Print the first prompts as the model will read them, and how many were too long."""
    for prompt in rendered.prompts[:SHOWN_PROMPTS]:
        print(_framed(prompt), flush=True)
    say_overlong(rendered)


def say_overlong(rendered: Rendered) -> None:
    """Print how many prompts were left out, where any were."""
    if rendered.overlong:
        print(f"{rendered.overlong} prompts are longer than prompt.max_tokens and were left out", flush=True)


def _framed(prompt: Prompt) -> str:
    return f"prompt {prompt.id} ({len(prompt.tokens)} tokens, answer {prompt.gold}): {prompt.text!r}"
