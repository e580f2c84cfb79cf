"""The run folder: what a run writes, where it lies (docs/run-folder.md), and how it survives a
fault.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml
import zstandard

from megatron_efr import log
from megatron_efr.durable import append_line, remove_torn_writes, write_atomic, writing
from megatron_efr.evaluation.stored import read_evaluation
from megatron_efr.rollout.group_json import decode_credited, encode_credited, encode_graded
from megatron_efr.rollout.journal import Journal
from megatron_efr.run.changes import Completed, refusal
from megatron_efr.types import Credited, Graded, UserError

Stage = TypeVar("Stage")  # of a group


class RunFolderError(UserError):
    """A run folder that cannot be used as asked. The message says what lies there and what would be
    right.
    """


class RunFolder:
    """runs/<name>: paths of everything a run writes, and the reading and writing of it. Making one
    writes nothing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lock = self.path / ".lock"  # while a run works here
        self.config = self.path / "config.yaml"
        self.log = self.path / "log.txt"
        self.first_day = self.path / "began"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        # the starting model's responses, if a method wants them
        self.reference = self.path / "reference.jsonl"
        self.rollouts = self.path / "rollouts"
        self.evaluations = self.path / "eval"
        self.report = self.path / "report"
        self.summary = self.path / "summary.json"
        self.model = self.path / "model"
        # beside it, if low-rank adapters are trained: PEFT's folder of them
        self.adapter = self.path / "adapter"

    @property
    def has_work(self) -> bool:
        """True when a run has left something that starting over would lose or mix up."""
        written = self.metrics.exists() and self.metrics.stat().st_size > 0
        kept = (self.checkpoints, self.rollouts, self.path / "journal")
        return (
            written
            or self.reference.exists()
            or any(folder.is_dir() and any(folder.iterdir()) for folder in kept)
        )

    def claim(
        self, resolved_yaml: str, resume: bool = False, completed: Completed = yaml.safe_dump
    ) -> None:
        """Make the folder this run's own and save its configuration there. Rank 0 calls it before
        any work starts.

        `resolved_yaml` is `config.dump(config)`, and `completed` makes the same of what an older
        version left out of its own. Raises RunFolderError when the folder holds another
        configuration (naming every differing key), or the same one with work in it and `resume` is
        false. A folder whose run stopped before any work, such as at a data set that is not there,
        is taken over. A resumed run may change the keys of changes.MAY_CHANGE; what it finds
        damaged (config.yaml, metrics.jsonl) is named and not touched.
        """
        if self.config.exists() and (self.has_work or resume):
            if refused := refusal(self.config, resolved_yaml, resume, completed):
                raise RunFolderError(refused)
        elif self.has_work:
            raise RunFolderError(
                f"{self.path}: holds a run's work but no config.yaml, so nobody can tell what it "
                "is; choose another name, or delete the folder"
            )
        if self.has_work and not resume:
            raise RunFolderError(
                f"{self.path}: this run, with the same configuration, has been started before; "
                "pass --resume to go on from its last checkpoint, or choose another name"
            )
        if resume:
            self.read_metrics()
        write_atomic(self.config, resolved_yaml)

    def began(self) -> str:
        """The day on which work here began, YYYY-MM-DD: today if none is kept yet, and that one for
        good.
        """
        if not self.first_day.exists():
            write_atomic(self.first_day, datetime.now().date().isoformat() + "\n")
        text = self.first_day.read_text(encoding="utf-8", errors="replace").strip()
        try:
            return date.fromisoformat(text).isoformat()
        except ValueError as error:
            raise RunFolderError(
                f"{self.first_day}: {text!r} is no day; write the one on which this run began, "
                "YYYY-MM-DD"
            ) from error

    def append_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add one line `{"step": step, ...}`. Values that are not finite are written as null."""
        append_line(self.metrics, metrics_line(step, metrics).encode("utf-8"))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl in order, [] when there are none; a torn last line is left
        out.

        RunFolderError names a line that is damaged.
        """
        if not self.metrics.exists():
            return []
        *whole, _torn = self.metrics.read_bytes().split(b"\n")
        return [
            _metrics(line, f"{self.metrics}:{number}") for number, line in enumerate(whole, start=1)
        ]

    def truncate_metrics(self, step: int) -> int:
        """Drop the lines after `step`, the step resumed from, and any torn line; returns how many
        whole ones went.

        The file then goes on as an uninterrupted run's would.
        """
        lines = self.read_metrics()
        kept = [line for line in lines if line["step"] <= step]
        if self.metrics.exists():
            write_atomic(
                self.metrics, "".join(json.dumps(line, allow_nan=False) + "\n" for line in kept)
            )
        return len(lines) - len(kept)

    def go_on_from(self, step: int, total: int, unit: str = "iteration", every: int = 1) -> None:
        """Make the folder what it was after iteration `step` of `total`, and say so.

        Later metrics go, journals that it covers, and what killed writes left. Lines of metrics
        that are missing, of one in `every` iterations, are named on stderr.
        """
        self.truncate_metrics(step)
        self.clear_journals(step)
        for folder in (self.path, self.rollouts):
            remove_torn_writes(folder)
        remove_torn_writes(self.evaluations, "step_*")  # the others are of evaluations of their own
        held = {line["step"] for line in self.read_metrics()}
        if missing := [number for number in range(every, step + 1, every) if number not in held]:
            log.warning(
                f"{self.metrics}: {len(missing)} lines are missing, the first of {unit} "
                f"{missing[0]}; the run goes on, and its report will be without them"
            )
        if step >= total:
            said = (
                f"finished: its {total} {unit}s are made, and nothing is left to do but to write "
                f"{self.model}"
            )
        elif step:
            said = f"goes on after {unit} {step} of {total}"
        else:
            said = f"no checkpoint yet: begins with {unit} 1 of {total}"
        log.event("resume", f"{self.path}: {said}")

    def journal(self, step: int) -> Journal:
        """The journal of iteration `step`: a file per iteration, so that a resume never takes
        another one's groups.
        """
        return Journal(self.path / "journal" / f"step_{step:06d}.jsonl")

    def monitor(self, step: int) -> Path:
        """The journal of the monitor set's responses after iteration `step`."""
        return self.path / "journal" / f"monitor_{step:06d}.jsonl"

    def clear_journals(self, step: int) -> None:
        """Remove the journals of iterations up to `step`: a checkpoint covers them. There is none
        of step 0.
        """
        for path in sorted((self.path / "journal").glob("*_*.jsonl")):
            if int(path.stem.rpartition("_")[2]) <= step > 0:
                with writing(path):
                    path.unlink()

    def rollouts_path(self, step: int) -> Path:
        return self.rollouts / f"step_{step:06d}.jsonl.zst"

    def write_rollouts(self, step: int, groups: Iterable[Credited]) -> None:
        """Keep iteration `step`'s groups, losslessly, as zstd-compressed JSON lines."""
        _write_lines(self.rollouts_path(step), map(encode_credited, groups))

    def read_rollouts(self, step: int) -> list[Credited]:
        """Iteration `step`'s groups as they were written. RunFolderError if they were not kept or
        are damaged.
        """
        path = self.rollouts_path(step)
        if not path.exists():
            raise RunFolderError(
                f"{path}: the rollouts of step {step} were not kept (observe.rollouts: true keeps "
                "them)"
            )
        return read_rollouts(path)

    def evaluation_path(self, name: str) -> Path:
        """eval/<name>.json; RunFolderError for a name that is no file name."""
        if not name or "/" in name or name.startswith("."):
            raise RunFolderError(
                f"evaluation name {name!r}: a file name without '/' and not beginning with '.'"
            )
        return self.evaluations / f"{name}.json"

    def write_answers(self, name: str, groups: Iterable[Graded]) -> None:
        """Keep an evaluation's judged groups, likewise, as eval/<name>.jsonl.zst."""
        _write_lines(
            self.evaluation_path(name).with_suffix(".jsonl.zst"), map(encode_graded, groups)
        )

    def evaluation_lock(self, name: str) -> Path:
        """The lock of an evaluation that will write eval/<name>.json."""
        return self.evaluation_path(name).with_name(f".{name}.lock")

    def write_evaluation(self, name: str, record: Mapping[str, Any]) -> Path:
        """Save an evaluation record as eval/<name>.json and return its path."""
        path = self.evaluation_path(name)
        write_atomic(path, json.dumps(record, allow_nan=False, ensure_ascii=False, indent=1) + "\n")
        return path

    def read_evaluations(self) -> dict[str, dict[str, Any]]:
        """name -> record of every eval/<name>.json, sorted by name; UserError names one that is
        none.
        """
        paths = sorted(self.evaluations.glob("*.json"))
        return {path.stem: read_evaluation(path) for path in paths}

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Save summary.json."""
        write_atomic(
            self.summary, json.dumps(summary, allow_nan=False, ensure_ascii=False, indent=2) + "\n"
        )


def metrics_line(step: int, metrics: Mapping[str, Any]) -> str:
    """A line of metrics.jsonl, without its end."""
    tree = {"step": int(step)} | {
        key: _plain(value) for key, value in metrics.items() if key != "step"
    }
    return json.dumps(tree, allow_nan=False)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    text = "".join(line + "\n" for line in lines)
    write_atomic(path, zstandard.ZstdCompressor(level=3).compress(text.encode("utf-8")))


def read_rollouts(path: Path) -> list[Credited]:
    """The groups of a rollouts file. RunFolderError if it cannot be read."""
    return read_groups(path, decode_credited)


def read_groups(path: Path, decode: Callable[[bytes], Stage]) -> list[Stage]:
    """The groups of a compressed file of lines that `decode` reads. RunFolderError if it cannot be
    read.
    """
    try:
        text = zstandard.ZstdDecompressor().decompress(path.read_bytes())
        return [decode(line) for line in text.split(b"\n") if line]
    except UserError as error:
        raise RunFolderError(
            f"{path}: rollouts that this version does not know: {error}"
        ) from error
    except (
        OSError,
        zstandard.ZstdError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise RunFolderError(
            f"{path}: damaged rollouts: {type(error).__name__}: {error}"
        ) from error


def _metrics(line: bytes, where: str) -> dict[str, Any]:
    """A line of metrics.jsonl; RunFolderError if it is none."""
    try:
        found = json.loads(line)
        if not isinstance(found["step"], int):
            raise ValueError(f"step is {found['step']!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunFolderError(
            f"{where}: damaged: no line of metrics ({error}); put a copy of the file back, or "
            "delete that line: the run goes on without it"
        ) from error
    return found


def _plain(value: Any) -> Any:
    """A metric as JSON holds it: numpy and torch scalars become Python's, NaN and infinities
    null.
    """
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
