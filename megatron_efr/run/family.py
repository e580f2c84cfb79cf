"""The runs of a sweep: the programs that train and evaluate each model, and which of them have
finished.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from megatron_efr.config import ConfigError, EvaluateConfig, TrainConfig
from megatron_efr.config.file import dump
from megatron_efr.config.sweep import Member, of_members
from megatron_efr.durable import write_atomic
from megatron_efr.run.folder import RunFolder, RunFolderError
from megatron_efr.run.main_rank import date_prompts
from megatron_efr.run.side_by_side import Command


class Program(NamedTuple):
    """A program of a sweep: its command, its configuration's file and text, and the file that it
    makes.

    `of` is the configuration of the training whose model it evaluates: another one makes another
    evaluation.
    """

    name: str  # of its log
    command: list[str]
    path: Path
    text: str
    makes: Path
    of: str = ""


class Task(NamedTuple):
    """One model of a family: a member, or a base, which is not trained and is no member."""

    name: str
    member: Member | None
    base: str  # name of the base that it begins with
    weights: Path
    training: Program | None
    evaluation: Program

    @property
    def listed_as(self) -> tuple[str, str]:
        """Name and label of the model that it is a run of."""
        return (
            (self.name, self.name)
            if self.member is None
            else (self.member.model, self.member.label)
        )


class Family:
    """`runs/<name>/`: each member's run in a folder of its name, every evaluation in eval/.

    Members that begin with the same model and are asked the same share one base. All are evaluated
    with the family's seed, so that a member's own seed changes its training alone.
    """

    def __init__(
        self, config: TrainConfig, members: Sequence[Member], ranks: int, resume: bool
    ) -> None:
        self.name = config.name
        self.folder = RunFolder(config.folder)
        self.logs = self.folder.path / "logs"
        self._config = config
        self._ranks = ranks
        self._resume = resume
        self._members = members

    def tasks(self) -> list[Task]:
        """Work to do, bases first."""
        bases: dict[str, Task] = {}
        trained: list[Task] = []
        for member in self._members:
            start = member.config.model
            begins = dump(self._asked(member, start.path, start.init))
            if begins not in bases:
                name = f"base-{len(bases) + 1}" if bases else "base"
                bases[begins] = Task(
                    name, None, name, Path(start.path), None, self._evaluation(name, begins)
                )
            weights = self.folder.path / member.name / "model"
            training = self._training(member, weights)
            asked = dump(self._asked(member, str(weights), "load"))
            evaluation = self._evaluation(member.name, asked)._replace(of=training.text)
            trained.append(
                Task(member.name, member, bases[begins].name, weights, training, evaluation)
            )
        return [*bases.values(), *trained]

    def date_prompts(self) -> None:
        """Let prompts that tell a date tell the day on which this family began, before programs are
        written.
        """
        for member in self._members:
            date_prompts(member.config.data.prompt, self.folder)

    def check_resumed(self, tasks: Sequence[Task]) -> None:
        """Refuse to start over if members have left work, if they are not to be resumed."""
        runs = [
            RunFolder(self.folder.path / task.name) for task in tasks if task.member is not None
        ]
        if not self._resume and (begun := [run.path.name for run in runs if run.has_work]):
            raise RunFolderError(
                f"{self.folder.path}: there is work of {of_members(begun)}; pass --resume to go "
                "on with it, or choose another name"
            )

    def has_finished(self, program: Program) -> bool:
        """True if this very program has finished, and what it made is there."""
        mark = self._mark(program)
        return (
            program.makes.exists()
            and mark.exists()
            and mark.read_text(encoding="utf-8") == _finished(program)
        )

    def begin(self, programs: Sequence[Program]) -> list[Program]:
        """Write the configurations of the programs that are left to run, and return those."""
        left = [
            program for program in programs if not (self._resume and self.has_finished(program))
        ]
        for program in left:
            write_atomic(program.path, program.text)
        return left

    def finish(self, program: Program) -> None:
        """Remember that this program has finished, with this configuration."""
        write_atomic(self._mark(program), _finished(program))

    def _mark(self, program: Program) -> Path:
        return self.folder.path / "finished" / program.path.name

    def _training(self, member: Member, model: Path) -> Program:
        path = self._config_path(member.name)
        torchrun = [
            sys.executable,
            "-m",
            "megatron_efr.torchrun",
            "--standalone",
            f"--nproc-per-node={self._ranks}",
        ]
        resume = ["--resume"] if self._resume else []
        command = [*torchrun, "-m", "megatron_efr.train", str(path), *resume]
        return Program(member.name, command, path, dump(member.config), model / "config.json")

    def _evaluation(self, name: str, text: str) -> Program:
        """The program of one evaluation, which makes none again that is finished."""
        path = self._config_path(f"eval-{name}")
        replace = ["--replace"] if self._resume else []  # evaluation.* may change on resuming
        command = [
            sys.executable,
            "-m",
            "megatron_efr.evaluate",
            str(path),
            f"--record={name}",
            *replace,
        ]
        return Program(f"eval {name}", command, path, text, self.folder.evaluation_path(name))

    def _asked(self, member: Member, model: str, init: str) -> EvaluateConfig:
        config = member.config
        return EvaluateConfig(
            name=self._config.name,
            runs=self._config.runs,
            seed=self._config.seed,
            model=config.model.model_copy(update={"path": model, "init": init, "lora": None}),
            prompt=config.data.prompt,
            evaluation=config.evaluation,
            grading=config.grading,
            rollout=config.rollout.for_evaluation(self._ranks),
        )

    def _config_path(self, name: str) -> Path:
        return self.folder.path / "configs" / f"{name}.yaml"


class Work:
    """Programs of these tasks that are left to run. Evaluations wait behind all trainings, and run
    as soon as there is no training for a job: `first` and `following` are for `side_by_side`.
    """

    def __init__(self, family: Family, tasks: Sequence[Task]) -> None:
        self._family = family
        trainings = family.begin([task.training for task in tasks if task.training is not None])
        names = {program.name for program in trainings}
        # what evaluates a model that is still to be trained, and the others
        self._evaluations = {task.name: task.evaluation for task in tasks if task.name in names}
        ready = family.begin([task.evaluation for task in tasks if task.name not in names])
        self._programs = dict[str, Program]()
        self.first = self._begun([*trainings, *ready])
        self.trained: float | None = None  # when the last training ended, by time.monotonic

    def following(self, name: str, well: bool) -> list[Command]:
        """The evaluation that may begin as this program has ended, if any; that it ended `well` is
        remembered.
        """
        evaluation = self._evaluations.get(name)
        if evaluation is not None:
            self.trained = time.monotonic()
        if not well:
            return []
        self._family.finish(self._programs[name])
        return self._begun(self._family.begin([evaluation])) if evaluation is not None else []

    def _begun(self, programs: Sequence[Program]) -> list[Command]:
        self._programs |= {program.name: program for program in programs}
        return [(program.name, program.command) for program in programs]


def _finished(program: Program) -> str:
    """Content of the mark that a finished program leaves."""
    return program.text + (f"---\n{program.of}" if program.of else "")


def chosen(tasks: Sequence[Task], patterns: Sequence[str]) -> list[Task]:
    """Those whose names fit one of the patterns, with their bases; all if there is no pattern."""
    for pattern in patterns:
        if not any(fnmatch(task.name, pattern) for task in tasks):
            raise ConfigError(f"--only {pattern}: no member has such a name; --list prints them")
    named = [
        task
        for task in tasks
        if not patterns or any(fnmatch(task.name, pattern) for pattern in patterns)
    ]
    wanted = {task.name for task in named} | {task.base for task in named}
    return [task for task in tasks if task.name in wanted]
