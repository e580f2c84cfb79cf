"""`efr sweep`: one model per alpha of the same configuration, trained side by side, evaluated, reported."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_efr import algorithms, arguments, methods
from megatron_efr.config import ConfigError, EvaluateConfig, TrainConfig
from megatron_efr.config.file import dump
from megatron_efr.durable import write_atomic
from megatron_efr.report.records import build_summary
from megatron_efr.report.run_page import write_run_page
from megatron_efr.run.environment import check_evaluation, date_prompts
from megatron_efr.run.folder import RunFolder
from megatron_efr.run.owner import owned
from megatron_efr.run.side_by_side import side_by_side


@dataclass(frozen=True, slots=True)
class Member:
    """One model of the family; the base, which all start from, has no alpha."""

    name: str
    alpha: float | None
    model: str  # folder of its weights


class Family:
    """The runs of one sweep: `runs/<name>/alpha-<value>` each, every evaluation in `runs/<name>/eval`."""

    def __init__(self, config: TrainConfig, alphas: Sequence[float], ranks: int) -> None:
        if not config.evaluation.datasets:
            raise ConfigError("evaluation.datasets: a sweep evaluates every model, and needs held-out problems")
        config.check_world(ranks)
        if len({f"{alpha:g}" for alpha in alphas}) < len(alphas):
            raise ConfigError(f"--alphas: {', '.join(f'{a:g}' for a in alphas)}: each value once; it names the run")
        algorithm = algorithms.build(config.algorithm, config.rollout)
        for alpha in alphas:
            given = config.method.model_copy(update={"alpha": alpha})
            method = methods.build(given, config.rollout, config.algorithm)
            methods.check_together(given.name, method, algorithm)
        self.config, self.ranks = config, ranks
        self.folder = RunFolder(config.folder)
        self.base = Member("base", None, config.model.path)
        self.trained = [Member(f"alpha-{a:g}", a, str(config.folder / f"alpha-{a:g}" / "model")) for a in alphas]

    def run(self, jobs: int, seconds: dict[str, float], note: str, resume: bool) -> None:
        """Train, evaluate and report, at most `jobs` processes at once; `seconds` is what was spent before.

        To `resume`, runs go on from their checkpoints and evaluations from their journals; what is finished stays.
        """
        if jobs > 1 and self.config.rollout.urls:
            raise ConfigError(
                f"--jobs {jobs} with rollout.urls: runs at the same time would publish different weights to the same "
                "servers; --jobs 1, or leave urls out, and each run starts its own"
            )
        check_evaluation(self.config)
        with owned(self.folder.lock, str(self.folder.path)):
            self._run(jobs, seconds, note, resume)

    def _run(self, jobs: int, seconds: dict[str, float], note: str, resume: bool) -> None:
        date_prompts(self.config.data.prompt, self.folder)
        logs, began = self.folder.path / "logs", time.monotonic()
        side_by_side([(member.name, self._training(member, resume)) for member in self.trained], logs, jobs)
        seconds["rl"] = time.monotonic() - began
        began = time.monotonic()
        members = [self.base, *self.trained]
        evaluations = [(f"eval {member.name}", self._evaluation(member, resume)) for member in members]
        side_by_side(evaluations, logs, jobs)
        seconds["evaluate"] = time.monotonic() - began
        seconds["total"] = sum(seconds.values())
        alphas = {member.name: member.alpha for member in members}
        summary = build_summary(self.folder.read_evaluations(), alphas, seconds)
        self.folder.write_summary(summary | {"note": note})
        write_run_page(self.folder, [RunFolder(self.folder.path / member.name) for member in self.trained])

    def _training(self, member: Member, resume: bool) -> list[str]:
        config = self.config.model_copy(deep=True)
        config.name = f"{self.config.name}/{member.name}"
        config.method = config.method.model_copy(update={"alpha": member.alpha})
        path = self._write(f"{member.name}.yaml", dump(config))
        torchrun = [sys.executable, "-m", "megatron_efr.torchrun", "--standalone", f"--nproc-per-node={self.ranks}"]
        return [*torchrun, "-m", "megatron_efr.train", str(path), *(["--resume"] if resume else [])]

    def _evaluation(self, member: Member, resume: bool) -> list[str]:
        """The command of one evaluation, which makes none again that is finished."""
        update = {"path": member.model} | ({} if member.alpha is None else {"init": "load"})
        config = EvaluateConfig(
            name=self.config.name,
            runs=self.config.runs,
            seed=self.config.seed,
            model=self.config.model.model_copy(update=update),
            prompt=self.config.data.prompt,
            evaluation=self.config.evaluation,
            grading=self.config.grading,
            rollout=self.config.rollout.for_evaluation(self.ranks),
        )
        path = self._write(f"eval-{member.name}.yaml", dump(config))
        replace = ["--replace"] if resume else []  # evaluation.* may change on resuming
        return [sys.executable, "-m", "megatron_efr.evaluate", str(path), f"--record={member.name}", *replace]

    def _write(self, name: str, text: str) -> Path:
        path = self.folder.path / "configs" / name
        write_atomic(path, text)
        return path


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `efr sweep`."""
    parser = arguments.parser("sweep", "Train, evaluate and report one model per alpha.", resumes=True)
    parser.add_argument("--alphas", required=True, help="comma-separated, such as 0,0.1,0.4")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--ranks", type=int, default=1, help="processes of each run (torchrun --nproc-per-node)")
    parser.add_argument("--seconds", action="append", default=[], metavar="PART=S", help="time spent before, to report")
    parser.add_argument("--note", default="", help="what the report's reader must know about these figures")
    given = parser.parse_intermixed_args(argv)
    try:
        alphas = [float(text) for text in given.alphas.split(",")]
        seconds = {part: float(value) for part, value in (text.split("=") for text in given.seconds)}
    except ValueError as error:
        raise ConfigError(f"--alphas {given.alphas!r}, --seconds {given.seconds!r}: {error}") from error
    if min(given.jobs, given.ranks) < 1:
        raise ConfigError(f"--jobs {given.jobs}, --ranks {given.ranks}: at least 1 of each")
    with arguments.configured(TrainConfig, given) as config:
        Family(config, alphas, given.ranks).run(given.jobs, seconds, given.note, given.resume)


if __name__ == "__main__":
    arguments.run(main)
