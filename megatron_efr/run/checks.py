"""Everything that can be found wrong with runs before any of them begins."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

from megatron_efr import algorithms, methods
from megatron_efr.config import ConfigError, TrainConfig
from megatron_efr.config.sweep import Member, of_members
from megatron_efr.errors import UserError
from megatron_efr.policy.check import check_policy
from megatron_efr.rollout.build import check_engine
from megatron_efr.rollout.servers.arguments import check_server_arguments
from megatron_efr.rollout.servers.host import Host
from megatron_efr.run.main_rank import MainRank, check_evaluation
from megatron_efr.weights.architecture import Architecture

# no data is read by these
_ELSEWHERE = {"name", "runs", "seed", "optimizer", "train", "checkpoint", "observe"}


def check_configuration(
    config: TrainConfig, ranks: int, asks: bool = True
) -> tuple[methods.Method, algorithms.Algorithm, Architecture]:
    """The method and the algorithm of a run of `ranks` ranks, and its model's architecture;
    ConfigError for what its configuration shows is wrong. A replay `asks` no engine, and needs none
    that could be had here.
    """
    method = methods.build(config.method, config.rollout, config.algorithm)
    algorithm = algorithms.build(config.algorithm, config.rollout)
    methods.check_together(config.method.name, method, algorithm)
    config.check_world(ranks)
    architecture = Architecture.from_folder(config.model.path)
    check_policy(config.model, config.parallel, config.optimizer, architecture)
    if asks:
        check_engine(config.model, config.rollout)
        Host.of_this_process().engine_gpus(config.rollout)
        check_server_arguments(config.rollout)
    return method, algorithm, architecture


def check_members(members: Sequence[Member], ranks: int, jobs: int = 1) -> None:
    """Check configuration, model folder and data of every member of a sweep; one ConfigError for
    all that is wrong.

    Members that ask the same of the same data are checked once. `jobs` of them run at once.
    """
    # runs at the same time must not share servers
    if jobs > 1 and any(member.config.rollout.urls for member in members):
        raise ConfigError(
            f"--jobs {jobs} with rollout.urls: runs at the same time would publish different "
            "weights to the same servers; --jobs 1, or leave urls out, and each run starts its own"
        )
    # each member's configuration; data that several share is read once
    alike: dict[str, list[Member]] = {}
    architectures: dict[str, Architecture] = {}
    problems: dict[str, list[str]] = {}
    for member in members:
        if not member.config.evaluation.datasets:
            raise ConfigError(
                "evaluation.datasets: a sweep evaluates every model, and needs held-out problems"
            )
        # a fault that many members share is said once, with their names
        try:
            *_, architecture = check_configuration(member.config, ranks)
        except UserError as error:
            problems.setdefault(str(error), []).append(member.name)
        else:
            read = member.config.model_dump_json(exclude=_ELSEWHERE)
            alike.setdefault(read, []).append(member)
            architectures[read] = architecture
    # tokenizing the data takes the time: once for members that ask the same of it
    for read, same in alike.items():
        try:
            _check_data(same[0].config, architectures[read])
        except UserError as error:
            problems.setdefault(str(error), []).extend(member.name for member in same)
    # all faults in one error, each with its members
    if problems:
        raise ConfigError(
            "\n".join(_said(text, names, len(members)) for text, names in problems.items())
        )


def _check_data(config: TrainConfig, architecture: Architecture) -> None:
    """Read the model's folder, the training and the held-out problems, and take none into use."""
    method = methods.build(config.method, config.rollout, config.algorithm)
    algorithm = algorithms.build(config.algorithm, config.rollout)
    with contextlib.redirect_stdout(io.StringIO()):  # each run shows its prompts itself
        main_rank = MainRank(config, method, algorithm, architecture)
        main_rank.close()
        # else it has rendered and checked the held-out problems itself
        if main_rank.evaluator is None:
            check_evaluation(config, architecture)


def _said(text: str, names: Sequence[str], count: int) -> str:
    return text if len(names) == count else f"{of_members(names)}: {text}"
