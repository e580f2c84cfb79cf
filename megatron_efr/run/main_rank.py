"""Rank 0's own part of a run: tokenizer, prompts, engine, ledger, graders, held-out problems."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_efr.algorithms import Algorithm
from megatron_efr.config import ConfigError, PromptConfig, TrainConfig
from megatron_efr.data.lengths import check_prompts
from megatron_efr.data.prompts import Rendered, load_tokenizer
from megatron_efr.data.stop_tokens import stop_ids
from megatron_efr.data.stream import PromptStream
from megatron_efr.data.thinking import thinking_marks
from megatron_efr.evaluation.evaluator import Evaluator
from megatron_efr.evaluation.problems import SHOWN_PROMPTS, judgings_of, load_prompts, show
from megatron_efr.grading import Grader
from megatron_efr.grading.groups import grade_groups
from megatron_efr.grading.judging import Judgings
from megatron_efr.methods import Given, Knowledge, Known, Method, check_given, reward
from megatron_efr.methods.samplings import ByPrompt
from megatron_efr.rollout.build import ENGINES, build_engine
from megatron_efr.rollout.codec import TokenizerCodec
from megatron_efr.rollout.engine import Engine
from megatron_efr.rollout.group_feed import GroupFeed
from megatron_efr.rollout.judging import Accept
from megatron_efr.rollout.ledger import Ledger
from megatron_efr.rollout.servers.run_servers import Servers
from megatron_efr.run.asking import Asking
from megatron_efr.run.folder import RunFolder
from megatron_efr.run.samplings import Sampler, check_there, figures
from megatron_efr.types import Group, Prompt, Rewarded, Sampling
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import initial_weights


class MainRank:
    """The prompts that the policy is asked, the engine that answers for it, and the graders of its
    answers.

    The first and the last are there when it is made, and checked; the engine when `connect` has
    taken it into use.
    """

    engine: Engine
    feed: GroupFeed
    ledger: Ledger

    def __init__(
        self,
        config: TrainConfig,
        method: Method,
        algorithm: Algorithm,
        architecture: Architecture,
    ) -> None:
        tokenizer = load_tokenizer(config.model.path, architecture.raw)
        # refuses a folder whose weights are missing or are others than config.json's, before
        # anything is built
        initial_weights(config.model, architecture, config.seed)
        # prompts, and the tokens that end a response
        rendered = load_prompts(config.data.datasets, tokenizer, config.data.prompt, config.grading)
        stops = stop_ids(config.model.path, tokenizer, architecture.raw)
        self.stream = PromptStream(rendered.prompts, config.seed, config.data.shuffle)
        # the held-out problems, if they are evaluated or watched
        watches = method.samplings.held_out
        if watches and not config.evaluation.datasets:
            raise ConfigError(
                f"evaluation.datasets: empty, and method {config.method.name} watches problems "
                "that are not trained on"
            )
        self.evaluator = (
            evaluator_of(config, tokenizer, stops, architecture.max_positions)
            if config.evaluation.every or watches
            else None
        )
        # an evaluation's penalties would change the log-probs that rollouts report
        abilities = ENGINES[config.rollout.engine].abilities
        if self.evaluator and self.evaluator.script.penalised and "penalties" not in abilities:
            raise ConfigError(
                f"evaluation.script.name: {config.evaluation.script.name} penalises tokens, and "
                "the servers of a run take no penalty: their log-probs must be the sampler's; "
                "leave evaluation.every out, and ask by efr evaluate"
            )
        # refuse before work starts: too long prompts, and what the method needs and lacks
        asked = [*rendered.prompts, *(self.evaluator.prompts if self.evaluator and watches else ())]
        check_prompts(
            asked,
            config.rollout.max_new_tokens,
            architecture.max_positions,
            "rollout.max_new_tokens",
        )
        self._config, self._architecture = config, architecture
        self._codec = TokenizerCodec(tokenizer)
        self._method, self._algorithm = method, algorithm
        # the method's needs: an engine that can, a thought with an end, iterations enough
        rollout = config.rollout
        marks = thinking_marks(config.model.thinking, tokenizer)
        given = Given(rollout.engine, abilities, marks, config.train.iterations)
        check_given(config.method.name, method.needs, given)
        if method.samplings.reference:
            check_there(config.data.reference, RunFolder(config.folder).reference)
        # what the method knows, and how it asks
        self.knowledge = Knowledge(method, rollout.max_new_tokens, marks)
        self._asking = Asking(config, method, tokenizer, lambda: self.knowledge.latest)
        self._asking.check(rendered.prompts, self._codec, architecture.max_positions)
        shown = [self._asking.example(prompt) for prompt in rendered.prompts[:SHOWN_PROMPTS]]
        show(Rendered(shown, rendered.left_out))
        # sampling and grading
        self._sampling = Sampling(rollout.temperature, rollout.top_p, rollout.max_new_tokens, stops)
        self._judgings = judgings_of(config.grading, config.data.datasets)
        others = self.evaluator.judgings.verifiers if self.evaluator else []
        self.grader = Grader.of(config.grading, [*self._judgings.verifiers, *others])
        self._prompts = rendered.prompts

    def connect(self, servers: Servers, resources: ExitStack) -> None:
        """Take the engine into use, over `servers` or embedded; `resources` end it, and the thread
        of rollouts.
        """
        config = self._config
        logs = config.folder / "engines"
        self.engine = build_engine(
            config.model,
            self._architecture,
            config.rollout,
            servers,
            logs,
            self._codec,
            resources,
        )
        self.feed = GroupFeed(self.engine, self._sampling)
        self.ledger = Ledger(
            self.stream,
            self.judging,
            self.feed,
            config.rollout,
            seed=config.seed,
            last=config.train.iterations,
            ask=self._asking.request,
        )
        resources.callback(self.ledger.close)

    def judging(self, step: int) -> Accept:
        """Judge of iteration `step`'s groups, made as it begins: by what is known now."""
        return partial(self._accept, self.knowledge.begin(step))

    def _accept(self, known: Known, groups: Sequence[Group]) -> list[Rewarded | None]:
        """Grade and reward finished groups; None in the place of one that the algorithm does not
        keep.
        """
        graded = grade_groups(
            self.grader, groups, self._judgings, branches=self._method.needs.branches
        )
        rewarded = [reward(self._method, group, known) for group in graded]
        return [group if self._algorithm.keeps(group.rewards) else None for group in rewarded]

    def sample(self, step: int, folder: RunFolder, model: str) -> dict[str, float]:
        """Sample what the method wants to know beside rollouts, with the weights of iteration
        `step`; figures of it.

        `model` is the starting model's checksum. What is known already is not sampled again.
        """
        wanted, known = self._method.samplings, self.knowledge
        monitor = wanted.monitor
        # other held-out problems than those watched before are refused
        if monitor and wanted.held_out:
            self._monitored(model, True).check_held_out(monitor, known.latest.monitor)
        # what of the starting model is not known yet
        if wanted.reference and not known.reference:
            with self.feed.held():
                known.reference = self._reference(wanted.reference, folder, model)
        # the monitor set, if it is its iteration
        if not monitor or step % monitor.every or known.monitored == step:
            return {}
        sampler = self._monitored(model, wanted.held_out)
        with self.feed.held():
            sampled = sampler.monitor(self.engine, monitor, step, folder.monitor(step))
        known.monitor(step, sampled)
        return figures(sampled)

    def _monitored(self, model: str, held_out: bool) -> Sampler:
        """Samples a method's monitor set: of held-out problems, or of the run's prompts."""
        if not held_out:
            return self._sampler(model, self._prompts, self._judgings)
        assert self.evaluator is not None
        return self._sampler(model, self.evaluator.prompts, self.evaluator.judgings)

    def _reference(self, samples: int, folder: RunFolder, model: str) -> ByPrompt:
        """The starting model's responses: another run's, if they are configured, or this run's
        own.
        """
        sampler = self._sampler(model, self._prompts, self._judgings)
        given = self._config.data.reference
        return sampler.reference(
            self.engine, samples, folder.reference, Path(given) if given else None
        )

    def _sampler(self, model: str, prompts: Sequence[Prompt], judgings: Judgings) -> Sampler:
        """Samples these prompts as rollouts are sampled."""
        datasets = {prompt.meta["dataset"] for prompt in prompts}
        asked = {
            "model": model,
            **asdict(self._sampling),
            **{
                f"grading of {name}": asdict(judgings.of_dataset(name)) for name in sorted(datasets)
            },
        }
        return Sampler(prompts, self._sampling, self.grader, judgings, self._config.seed, asked)

    def evaluate(self, step: int, folder: RunFolder) -> dict[str, float]:
        """Ask and grade held-out problems with the served weights, if step `step` is one to do so.

        The record goes to `folder`.
        """
        every = self._config.evaluation.every
        if self.evaluator is None or not every or step % every:
            return {}
        with self.feed.held():
            record = self.evaluator.run(self.engine, self.grader, f"step_{step:06d}")
        folder.write_evaluation(record["name"], record)
        return {"eval/accuracy": record["accuracy"], "eval/tokens": record["tokens"]}

    def engine_figures(self) -> dict[str, float]:
        """Servers that serve and, since the last call: lost, back, responses asked for again.

        `refused`: the groups that were replaced in the last iteration since the algorithm did not
        keep them.
        """
        health = self.engine.health()
        found = {
            f"engine/{name}": health[name]
            for name in ("serving", "lost", "back", "resent")
            if name in health
        }
        return found | {"engine/refused": float(self.ledger.refused)}

    def close(self) -> None:
        """End the grading processes."""
        self.grader.close()


def evaluator_of(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, stops: tuple[int, ...], positions: int
) -> Evaluator:
    """The held-out problems of a training run."""
    marks = thinking_marks(config.model.thinking, tokenizer)
    asking = config.evaluation, config.data.prompt, config.grading
    return Evaluator(*asking, tokenizer, stops, positions, config.seed, marks)


def check_evaluation(config: TrainConfig, architecture: Architecture) -> None:
    """Load and check the held-out problems of a run that itself does not ask them."""
    tokenizer = load_tokenizer(config.model.path, architecture.raw)
    stops = stop_ids(config.model.path, tokenizer, architecture.raw)
    evaluator_of(config, tokenizer, stops, architecture.max_positions)


def date_prompts(prompt: PromptConfig, folder: RunFolder) -> None:
    """Let prompts that tell a date tell the day on which work in `folder` began, if `prompt` names
    none.
    """
    prompt.date = prompt.date or folder.began()
