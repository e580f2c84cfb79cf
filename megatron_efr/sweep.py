"""`efr sweep`: a family of models from one configuration and what varies of it, trained, evaluated
and reported.
"""

from __future__ import annotations

import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress

from megatron_efr import arguments
from megatron_efr.cluster.array import array_script
from megatron_efr.config import ConfigError
from megatron_efr.config.sweep import Sweep, SweepConfig, is_sweep, load_alphas, load_sweep, varied
from megatron_efr.durable import write_atomic
from megatron_efr.report.family import Evaluated, write_family
from megatron_efr.run.checks import check_members
from megatron_efr.run.family import Family, Task, Work, chosen
from megatron_efr.run.folder import RunFolder
from megatron_efr.run.interruption import EXIT_REQUEUE
from megatron_efr.run.owner import OwnedError, owned
from megatron_efr.run.side_by_side import FailedError, side_by_side


def sweep(made: Sweep, given: Namespace, seconds: dict[str, float]) -> None:
    """Make the models that were asked for, or list them, or write their script; `seconds` is what
    was spent before.
    """
    file = made.file
    family = Family(made.config, made.members, made.file.ranks, given.resume)
    tasks = chosen(family.tasks(), given.only)
    if given.list:
        print("\n".join(f"{number:4} {task.name}" for number, task in enumerate(tasks)))
        return
    check_members([task.member for task in tasks if task.member is not None], file.ranks, file.jobs)
    family.date_prompts()
    tasks = chosen(family.tasks(), given.only)
    if given.slurm:
        write_script(file, family, len(tasks), given)
    elif given.member is not None:
        make_one(file, family, tasks, given.member)
    else:
        with owned(family.folder.lock, str(family.folder.path)):
            family.check_resumed(tasks)
            failed = make(family, tasks, file.jobs, seconds)
            write_results(family, seconds, file)
        if failed is not None:
            raise failed


def make(
    family: Family, tasks: Sequence[Task], jobs: int, seconds: dict[str, float]
) -> FailedError | None:
    """Train and evaluate, `jobs` programs at once; `seconds` gets the time until the last training
    ended, and the time after. The failed ones are returned.
    """
    began, failed = time.monotonic(), None
    work = Work(family, tasks)
    try:
        side_by_side(work.first, family.logs, jobs, work.following)
    except FailedError as error:
        failed = error
    trained = began if work.trained is None else work.trained
    seconds |= {"rl": trained - began, "evaluate": time.monotonic() - trained}
    seconds["total"] = sum(seconds.values())
    return failed


def make_one(file: SweepConfig, family: Family, tasks: Sequence[Task], number: int) -> None:
    """Train and evaluate one model; the one that is the last to be made writes the table and the
    report.
    """
    if number >= len(tasks):
        raise ConfigError(
            f"--member {number}: there are {len(tasks)} models, 0 to {len(tasks) - 1}"
        )
    if failed := make(family, [tasks[number]], 1, {}):
        raise failed
    if all(family.has_finished(task.evaluation) for task in tasks):
        # another's are the same
        with suppress(OwnedError), owned(family.folder.lock, str(family.folder.path)):
            write_results(family, {}, file)


def write_results(family: Family, seconds: dict[str, float], file: SweepConfig) -> None:
    """Write the table, summary.json and the report of all models that are evaluated by now."""
    tasks = [task for task in family.tasks() if family.has_finished(task.evaluation)]
    members = {task.name: task.member for task in tasks if task.member is not None}
    if not tasks:
        return
    keys = varied(list(members.values()))
    runs = [
        Evaluated(task.name, *task.listed_as, task.base, keys.get(task.name, {}), str(task.weights))
        for task in tasks
    ]
    folders = [RunFolder(member.config.folder) for member in members.values()]
    table, page = write_family(family.folder, runs, folders, seconds, file.note, file.against)
    print(f"table: {table}\nreport: {page}", flush=True)


def write_script(file: SweepConfig, family: Family, tasks: int, given: Namespace) -> None:
    """Write a SLURM script with a task for each model, and print how to submit it."""
    # each task of the array asks for its model by number: it must count the same models
    flags = [f"--only={pattern}" for pattern in given.only]
    flags += [
        f"--{key}={getattr(given, key)}"
        for key in ("alphas", "ranks", "note")
        if getattr(given, key) is not None
    ]
    program = [sys.executable, "-m", "megatron_efr.sweep"]
    command = [*program, given.config, *given.overrides, *flags, "--resume"]
    path = family.folder.path / "sweep.sbatch"
    script = array_script(family.name, tasks, command, family.logs, file.slurm, EXIT_REQUEUE)
    # the folder of logs must be there before SLURM starts a task
    family.logs.mkdir(parents=True, exist_ok=True)
    write_atomic(path, script)
    print(f"{tasks} models; submit them with\n    sbatch {shlex.quote(str(path))}", flush=True)


def read(given: Namespace) -> Sweep:
    """The sweep of the file, or of a training configuration and --alphas; flags go before what the
    file says.
    """
    if is_sweep(given.config):
        if given.alphas:
            raise ConfigError(
                f"--alphas {given.alphas}: {given.config} says itself what varies, such as "
                "method.alpha"
            )
        found = load_sweep(given.config, given.overrides)
    elif given.alphas:
        found = load_alphas(given.config, given.overrides, given.alphas)
    else:
        raise ConfigError(
            f"{given.config}: no sweep's file, which names a `base`: say what varies with --alphas"
        )
    flags = {
        key: getattr(given, key)
        for key in ("jobs", "ranks", "note")
        if getattr(given, key) is not None
    }
    return found._replace(file=found.file.model_copy(update=flags))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `efr sweep`."""
    positive, number = arguments.within(int, 1), arguments.within(int, 0)
    parser = arguments.parser(
        "sweep", "Train, evaluate and report a family of models.", resumes=True
    )
    # what varies, if the file does not say it, and how much of the machine it takes
    parser.add_argument("--alphas", help="values of method.alpha, such as 0,0.1,0.4")
    parser.add_argument(
        "--jobs", type=positive, help="programs at once; 1 unless the file says otherwise"
    )
    parser.add_argument(
        "--ranks", type=positive, help="processes of each run (torchrun --nproc-per-node)"
    )
    # what the report tells beside its figures
    parser.add_argument(
        "--seconds",
        action="append",
        default=[],
        metavar="PART=S",
        help="time spent before, to report",
    )
    parser.add_argument("--note", help="what the report's reader must know about these figures")
    # a part of the models, or none here: a list, or an array of jobs
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="members by name, as in 'efr*'",
    )
    parser.add_argument("--list", action="store_true", help="print the models, numbered, and end")
    parser.add_argument(
        "--slurm", action="store_true", help="write a script for sbatch instead of running here"
    )
    parser.add_argument(
        "--member", type=number, metavar="N", help="make the model of that number alone"
    )
    given = parser.parse_intermixed_args(argv)
    # a time that cannot be read is refused before days of training
    try:
        seconds = {
            part: float(value) for part, value in (text.split("=") for text in given.seconds)
        }
    except ValueError as error:
        raise ConfigError(f"--seconds {given.seconds!r}: {error}") from error
    with arguments.named(given.config):
        sweep(read(given), given, seconds)


if __name__ == "__main__":
    arguments.run(main)
